"""Loops over blocks with offsets, and over blocks whose columns lie scattered in a row.

See `loops.py` for how loops are written, `offsets.py` and `ordered.py` for what they must equal.

Grids are those of `nearest_uniform`: code c stands for c / `half` - 1. An element is `scale` times that, plus `shift`,
which is the offset plus the scale. Of scattered blocks, `groups` (uint32) is the block of each column of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.grids import SMALLEST_DIVISOR
from streamconv.kernels.loops import Array, factor_of, uniform_level
from streamconv.kernels.machine_code import compiled

_ZERO, _ONE, _FLOOR = np.float32(0), np.float32(1), np.float32(SMALLEST_DIVISOR)
_ALL_BUT_SIGN, _SIGN_PLACE = np.int32(0x7FFFFFFF), np.int32(31)
_INFINITY, _MINUS_INFINITY, _NAN = np.int32(0x7F800000), np.int32(-0x7F800001), np.int32(0x7FC00000)


@compiled
def _in_order(bits: Any) -> Any:
    """Bits of a float32 as an integer that is ordered as the floats are; and back again."""
    return bits ^ (bits >> _SIGN_PLACE & _ALL_BUT_SIGN)


@compiled
def ranges(bits: Array, low: Array, high: Array) -> None:
    """`bits` int32 [blocks, block]; `low` and `high` float32 [blocks]."""
    low_bits, high_bits = low.view(np.int32), high.view(np.int32)
    for b in range(bits.shape[0]):
        least = greatest = _in_order(bits[b, 0])
        for j in range(bits.shape[1]):
            x = _in_order(bits[b, j])
            least = x if x < least else least
            greatest = x if x > greatest else greatest
        is_nan = greatest > _INFINITY or least < _MINUS_INFINITY
        low_bits[b] = _NAN if is_nan else _in_order(least)
        high_bits[b] = _NAN if is_nan else _in_order(greatest)
    for b in range(low.size):
        low[b], high[b] = low[b] + _ZERO, high[b] + _ZERO  # no -0


@compiled
def nearest(values: Array, scales: Array, half: Any, codes: Array) -> None:
    """`scales` [blocks, 2]."""
    for b in range(values.shape[0]):
        factor = factor_of(scales[b, 0], _ONE, _FLOOR)
        shift = scales[b, 1] + scales[b, 0]
        for j in range(values.shape[1]):
            level = uniform_level((values[b, j] - shift) * factor, half)
            codes[b, j] = np.uint8(np.int32(level + half))


@compiled
def decode(codes: Array, scales: Array, half: Any, values: Array) -> None:
    """`scales` [blocks, 2]."""
    step = _ONE / half
    for b in range(values.shape[0]):
        scale, shift = scales[b, 0], scales[b, 1] + scales[b, 0]
        for j in range(values.shape[1]):
            values[b, j] = (np.float32(codes[b, j]) - half) * step * scale + shift


@compiled
def multiply(codes: Array, scales: Array, half: Any, values: Array) -> None:
    """Codes, counted from 0, times the stored step."""
    for b in range(values.shape[0]):
        step = scales[b, 0] / half
        for j in range(values.shape[1]):
            values[b, j] = np.float32(codes[b, j]) * step


@compiled
def add(scales: Array, values: Array) -> None:
    for b in range(values.shape[0]):
        offset = scales[b, 1]
        for j in range(values.shape[1]):
            values[b, j] += offset


@compiled
def take_columns(matrix: Array, columns: Array, out: Array) -> None:
    for r in range(out.shape[0]):
        for j in range(columns.size):
            out[r, j] = matrix[r, columns[j]]


@compiled
def put_columns(matrix: Array, columns: Array, out: Array) -> None:
    for r in range(out.shape[0]):
        for j in range(columns.size):
            out[r, columns[j]] = matrix[r, j]


@compiled
def nearest_scattered(
    values: Array, scales: Array, shifts: Array, groups: Array, half: Any, codes: Array
) -> None:
    """`scales` and `shifts` are [rows, groups]; without offsets, `shifts` are 0."""
    factors, x = np.empty(scales.shape[1], np.float32), np.empty(groups.size, np.float32)
    for r in range(values.shape[0]):
        less, row, into = shifts[r], values[r], codes[r]
        for g in range(factors.size):
            factors[g] = factor_of(scales[r, g], _ONE, _FLOOR)
        for c in range(groups.size):
            x[c] = (row[c] - less[groups[c]]) * factors[groups[c]]
        for c in range(groups.size):
            into[c] = np.uint8(np.int32(uniform_level(x[c], half) + half))


@compiled
def decode_scattered(
    codes: Array, scales: Array, shifts: Array, groups: Array, half: Any, has_shift: bool, values: Array
) -> None:
    step, x = _ONE / half, np.empty(groups.size, np.float32)
    for r in range(values.shape[0]):
        factors, more, row, out = scales[r], shifts[r], codes[r], values[r]
        for c in range(groups.size):
            x[c] = (np.float32(row[c]) - half) * step
        for c in range(groups.size):
            out[c] = x[c] * factors[groups[c]]
        if has_shift:
            for c in range(groups.size):
                out[c] += more[groups[c]]


@compiled
def unpack_bits(packed: Array, codes: Array) -> None:
    """`packed` [n, bits] to `codes` [n, 8]."""
    bits = np.uint64(packed.shape[1])
    mask = (np.uint64(1) << bits) - np.uint64(1)
    for i in range(codes.shape[0]):
        word = np.uint64(0)
        for k in range(packed.shape[1]):
            word |= np.uint64(packed[i, k]) << np.uint64(8 * k)
        for j in range(8):
            codes[i, j] = np.uint8(word & mask)
            word >>= bits


@compiled
def pack_bits(codes: Array, packed: Array) -> None:
    bits = np.uint64(packed.shape[1])
    for i in range(codes.shape[0]):
        word = np.uint64(0)
        for j in range(8):
            word |= np.uint64(codes[i, j]) << bits * np.uint64(j)
        for k in range(packed.shape[1]):
            packed[i, k] = np.uint8(word & np.uint64(255))
            word >>= np.uint64(8)
