"""Ranges of blocks, and integers and 16-bit floats for nested scales, compiled by numba.

See `kernels/loops.py` for how loops are written, `scales.py` and `fitting.py` for what they must equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.machine_code import compiled

Array = NDArray[Any]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_LARGEST, _LEAST_NORMAL = np.float32(65504), np.float32(2.0**-14)
_JUST_BELOW_HALF, _KEPT, _DROPPED, _1, _LOW_BITS = (
    np.uint32(number) for number in (0xFFF, 0xFFFFE000, 13, 1, 63)
)


@compiled
def _in_order(bits: Any) -> Any:
    """Bits of a float32 as an integer that is ordered as the floats are; and back again."""
    return bits ^ (bits >> np.int32(31) & _MAGNITUDE)


@compiled
def ranges(bits: Array, low: Array, high: Array) -> None:
    """Bits of the least and the greatest float of each block: `bits` [blocks, block], the others [blocks]."""
    for b in range(bits.shape[0]):
        least = greatest = _in_order(bits[b, 0])
        for j in range(1, bits.shape[1]):
            x = _in_order(bits[b, j])
            least = x if x < least else least
            greatest = x if x > greatest else greatest
        low[b], high[b] = _in_order(least), _in_order(greatest)


@compiled
def _to_half(x: Any, cell: Array, bits: Array) -> Any:
    """Nearest 16-bit float, half to even; `cell` is room for one number, and `bits` the same place as integer."""
    size = abs(x)
    if size >= _LARGEST:
        return np.float32(np.copysign(_LARGEST, x))
    if size < _LEAST_NORMAL:  # numbers from a half to 1 are as far apart as the smallest 16-bit floats
        return np.float32(np.copysign((size + _HALF) - _HALF, x))
    cell[0] = x
    known = bits[0]
    bits[0] = (known + _JUST_BELOW_HALF + (known >> _DROPPED & _1)) & _KEPT
    return cell[0]


@compiled
def halves(numbers: Array, out: Array) -> None:
    """Nearest 16-bit floats of finite `numbers`, flat."""
    cell = np.empty(1, np.float32)
    bits = cell.view(np.uint32)
    for i in range(numbers.size):
        out[i] = _to_half(numbers[i], cell, bits)


@compiled
def plain_start(low: Array, high: Array, divisor: Any, has_offset: bool, out: Array) -> None:
    """Starting scales from ranges, and offsets beside them: [blocks], or [2 blocks]."""
    for b in range(low.size):
        if has_offset:
            out[2 * b], out[2 * b + 1] = np.float32(high[b] - low[b]) / divisor, low[b]
        else:
            out[b] = (low[b] if -low[b] >= high[b] else high[b]) / divisor


@compiled
def _fits(wished: Array, i: int, factor: Any, lowest: Any, highest: Any, integers: Array) -> bool:
    """Write the integers nearest to the quotients; say whether they give exactly what was wished for."""
    divisor = factor if factor != _ZERO else _ONE
    is_exact = True
    for j in range(wished.shape[1]):
        x = np.rint(wished[i, j] / divisor)
        x = x if x > lowest else lowest
        x = x if x < highest else highest
        x = x if factor != _ZERO else _ZERO
        is_exact &= factor * x == wished[i, j]
        integers[i, j] = np.int16(x)
    return is_exact


@compiled
def nested(wished: Array, limit: int, is_signed: bool, factors: Array, integers: Array) -> None:
    """`wished` [n, blocks], `factors` [n], `integers` [n, blocks]."""
    cell = np.empty(1, np.float32)
    bits = cell.view(np.uint32)
    lowest, highest = np.float32(-limit if is_signed else 0), np.float32(limit - 1 if is_signed else limit)
    usual = np.float32(-limit if is_signed else limit)
    for i in range(wished.shape[0]):
        extreme = wished[i, 0]
        for j in range(1, wished.shape[1]):
            extreme = wished[i, j] if abs(wished[i, j]) > abs(extreme) else extreme
        factors[i] = _to_half(extreme / usual, cell, bits)
        if _fits(wished, i, factors[i], lowest, highest, integers):
            continue
        cell[0] = extreme
        # A product of 11 and of 7 significant bits has 18 of a float32's 24 at most.
        is_open = bits[0] & _LOW_BITS == 0
        for place in range(1, 2 * limit):
            size = np.float32(limit - (place // 2 if is_signed else place))
            multiple = -size if is_signed and place % 2 == 0 else size
            if not is_open or size <= _ZERO:
                break
            if multiple > highest:
                continue
            trial = _to_half(extreme / multiple, cell, bits)
            if trial * multiple == extreme and _fits(wished, i, trial, lowest, highest, integers):
                factors[i], is_open = trial, False
        if is_open:  # none fits: the last try has left its integers
            _fits(wished, i, factors[i], lowest, highest, integers)
