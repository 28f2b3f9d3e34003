"""Codes of ggml's types to bytes and back, and codes nearest to values, compiled by numba: see `kernels/loops.py` for
how loops are written, `packing.py` for what they must equal.

Codes are uint8 [n, super_block] in two's complement, `raw` is [n, bytes].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.machine_code import compiled

Array = NDArray[Any]

_ZERO, _ONE = np.float32(0), np.float32(1)
_LOW, _HIGH = np.uint8(15), np.uint8(4)
_NONE, _1, _2, _3 = np.uint8(0), np.uint8(1), np.uint8(2), np.uint8(3)
_4, _6 = np.uint8(4), np.uint8(6)
_ONE_BIT, _TWO_ONES, _FOUR_BITS, _FIFTEEN = (np.uint32(number) for number in (1, 3, 4, 15))


@compiled
def nearest(values: Array, scales: Array, lowest: Any, highest: Any, codes: Array) -> None:
    """`values` [blocks, block], `scales` [blocks]; halves to even."""
    for b in range(values.shape[0]):
        factor = _ONE / scales[b] if scales[b] != _ZERO else _ZERO
        for j in range(values.shape[1]):
            x = np.rint(values[b, j] * factor)
            x = x if x < highest else highest
            x = x if x > lowest else lowest
            codes[b, j] = np.uint8(np.int32(x))


@compiled
def nearest_above(values: Array, scales: Array, lowest: Any, highest: Any, codes: Array) -> None:
    """`scales` [blocks, 2]: with offsets."""
    for b in range(values.shape[0]):
        factor = _ONE / scales[b, 0] if scales[b, 0] != _ZERO else _ZERO
        offset = scales[b, 1]
        for j in range(values.shape[1]):
            x = np.rint((values[b, j] - offset) * factor)
            x = x if x < highest else highest
            x = x if x > lowest else lowest
            codes[b, j] = np.uint8(np.int32(x))


@compiled
def _pack_nibbles(codes: Array, i: int, start: int, stretch: int, add: Any, raw: Array, place: int) -> None:
    low, high = codes[i, start : start + stretch], codes[i, start + stretch : start + 2 * stretch]
    out = raw[i, place : place + stretch]
    for j in range(stretch):
        out[j] = np.uint8(np.uint8(low[j] + add) & _LOW) | np.uint8(np.uint8(high[j] + add) << _HIGH)


@compiled
def _pack_32(codes: Array, i: int, add: Any, raw: Array, place: int) -> None:
    """`_pack_nibbles` of a stretch of 16, as LLVM makes vectors of it."""
    known, out = codes[i], raw[i, place : place + 16]
    for j in range(16):
        out[j] = np.uint8(np.uint8(known[j] + add) & _LOW) | np.uint8(np.uint8(known[16 + j] + add) << _HIGH)


@compiled
def _unpack_nibbles(raw: Array, i: int, place: int, stretch: int, add: Any, codes: Array, start: int) -> None:
    for j in range(stretch):
        codes[i, start + j] = np.uint8((raw[i, place + j] & _LOW) - add)
    for j in range(stretch):
        codes[i, start + stretch + j] = np.uint8((raw[i, place + j] >> _HIGH) - add)


@compiled
def pack_q4(codes: Array, add: Any, place: int, raw: Array) -> None:
    for i in range(raw.shape[0]):
        _pack_32(codes, i, add, raw, place)


@compiled
def unpack_q4(raw: Array, add: Any, place: int, codes: Array) -> None:
    for i in range(raw.shape[0]):
        _unpack_nibbles(raw, i, place, 16, add, codes, 0)


@compiled
def pack_q5(codes: Array, add: Any, place: int, raw: Array) -> None:
    for i in range(raw.shape[0]):
        high = np.uint32(0)
        for j in range(32):
            bit = np.uint32(np.uint8(codes[i, j] + add) >> _4) & np.uint32(1)
            high |= bit << np.uint32(j)
        for part in range(4):
            raw[i, place + part] = np.uint8(high >> np.uint32(8 * part) & np.uint32(255))
        _pack_32(codes, i, add, raw, place + 4)


@compiled
def unpack_q5(raw: Array, add: Any, place: int, codes: Array) -> None:
    for i in range(raw.shape[0]):
        _unpack_nibbles(raw, i, place + 4, 16, _NONE, codes, 0)
        for j in range(32):
            bit = raw[i, place + (j >> 3)] >> np.uint8(j & 7) & _1
            codes[i, j] = np.uint8((codes[i, j] | bit << _4) - add)


@compiled
def pack_q8(codes: Array, add: Any, place: int, raw: Array) -> None:
    for i in range(raw.shape[0]):
        for j in range(32):
            raw[i, place + j] = codes[i, j]


@compiled
def unpack_q8(raw: Array, add: Any, place: int, codes: Array) -> None:
    for i in range(raw.shape[0]):
        for j in range(32):
            codes[i, j] = raw[i, place + j]


@compiled
def pack_q4_k(codes: Array, add: Any, place: int, raw: Array) -> None:
    for i in range(raw.shape[0]):
        for pair in range(4):
            _pack_nibbles(codes, i, 64 * pair, 32, add, raw, place + 32 * pair)


@compiled
def unpack_q4_k(raw: Array, add: Any, place: int, codes: Array) -> None:
    for i in range(raw.shape[0]):
        for pair in range(4):
            _unpack_nibbles(raw, i, place + 32 * pair, 32, _NONE, codes, 64 * pair)


@compiled
def pack_q5_k(codes: Array, add: Any, place: int, raw: Array) -> None:
    for i in range(raw.shape[0]):
        for j in range(32):
            raw[i, place + j] = 0
        for b in range(8):
            for j in range(32):
                raw[i, place + j] |= np.uint8(np.uint8(codes[i, 32 * b + j] >> _4 & _1) << np.uint8(b))
        for pair in range(4):
            _pack_nibbles(codes, i, 64 * pair, 32, add, raw, place + 32 + 32 * pair)


@compiled
def unpack_q5_k(raw: Array, add: Any, place: int, codes: Array) -> None:
    for i in range(raw.shape[0]):
        for b in range(8):
            start, shift, bit = place + 32 + 32 * (b // 2), np.uint32(4 * (b % 2)), np.uint32(b)
            for j in range(32):
                low = np.uint32(raw[i, start + j]) >> shift & _FIFTEEN
                high = np.uint32(raw[i, place + j]) >> bit & _ONE_BIT
                codes[i, 32 * b + j] = np.uint8(low | high << _FOUR_BITS)


@compiled
def pack_q6_k(codes: Array, add: Any, place: int, raw: Array) -> None:
    for i in range(raw.shape[0]):
        for half in range(2):
            _pack_nibbles(codes, i, 128 * half, 64, add, raw, 64 * half)
            for j in range(32):
                start = 128 * half + j
                bits = np.uint8(codes[i, start] + add) >> _4
                bits |= np.uint8(np.uint8(codes[i, start + 32] + add) >> _4) << _2
                bits |= np.uint8(np.uint8(codes[i, start + 64] + add) >> _4) << _4
                bits |= np.uint8(np.uint8(codes[i, start + 96] + add) >> _4) << _6
                raw[i, 128 + 32 * half + j] = np.uint8(bits)


@compiled
def unpack_q6_k(raw: Array, add: Any, place: int, codes: Array) -> None:
    for i in range(raw.shape[0]):
        for b in range(8):
            start, shift = 64 * (b // 4) + 32 * (b % 2), np.uint32(4 * (b // 2 % 2))
            above, bits = 128 + 32 * (b // 4), np.uint32(2 * (b % 4))
            for j in range(32):
                low = np.uint32(raw[i, start + j]) >> shift & _FIFTEEN
                high = np.uint32(raw[i, above + j]) >> bits & _TWO_ONES
                codes[i, 32 * b + j] = np.uint8(np.uint8(low | high << _FOUR_BITS) - add)


PACK: Mapping[str, Callable[[Array, Any, int, Array], None]] = {
    "q4_0": pack_q4,
    "q4_1": pack_q4,
    "q5_0": pack_q5,
    "q5_1": pack_q5,
    "q8_0": pack_q8,
    "q4_k": pack_q4_k,
    "q5_k": pack_q5_k,
    "q6_k": pack_q6_k,
}
UNPACK: Mapping[str, Callable[[Array, Any, int, Array], None]] = {
    "q4_0": unpack_q4,
    "q4_1": unpack_q4,
    "q5_0": unpack_q5,
    "q5_1": unpack_q5,
    "q8_0": unpack_q8,
    "q4_k": unpack_q4_k,
    "q5_k": unpack_q5_k,
    "q6_k": unpack_q6_k,
}
