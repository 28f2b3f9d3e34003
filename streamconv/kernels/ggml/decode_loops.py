"""Decoding of ggml's types, compiled by numba: see `kernels/loops.py` for how loops are written, `decoding.py` for what
they must equal.

`raw` is [super-blocks, bytes], `out` float32 [super-blocks, elements]. `halves` has the float32 value of every 16-bit
float; `table` is a type's lookup table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.machine_code import compiled

Array = NDArray[Any]

_HALF, _QUARTER, _EIGHTH = np.float32(0.5), np.float32(0.25), np.float32(0.125)
_1, _TWO_BITS, _THREE, _FOUR_BITS, _FIFTEEN = (np.uint32(number) for number in (1, 2, 3, 4, 15))
_ONE, _FOUR, _EIGHT, _SIXTEEN, _32 = (np.float32(number) for number in (1, 4, 8, 16, 32))


@compiled
def _half(raw: Array, i: int, place: int, halves: Array) -> Any:
    return halves[np.uint32(raw[i, place]) | np.uint32(raw[i, place + 1]) << np.uint32(8)]


@compiled
def _word(raw: Array, i: int, place: int) -> Any:
    return np.uint32(raw[i, place]) | np.uint32(raw[i, place + 1]) << np.uint32(8)


@compiled
def _double_word(raw: Array, i: int, place: int) -> Any:
    return _word(raw, i, place) | _word(raw, i, place + 2) << np.uint32(16)


@compiled
def q4_0(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for j in range(16):
            out[i, j] = scale * (np.float32(raw[i, 2 + j] & 15) - _EIGHT)
        for j in range(16):
            out[i, 16 + j] = scale * (np.float32(raw[i, 2 + j] >> 4) - _EIGHT)


@compiled
def q4_1(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, low = _half(raw, i, 0, halves), _half(raw, i, 2, halves)
        for j in range(16):
            out[i, j] = scale * np.float32(raw[i, 4 + j] & 15) + low
        for j in range(16):
            out[i, 16 + j] = scale * np.float32(raw[i, 4 + j] >> 4) + low


@compiled
def q5_0(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, high = _half(raw, i, 0, halves), _double_word(raw, i, 2)
        for j in range(16):
            code = np.uint32(raw[i, 6 + j] & 15) | (high >> np.uint32(j) & np.uint32(1)) << np.uint32(4)
            out[i, j] = scale * (np.float32(code) - _SIXTEEN)
        for j in range(16):
            code = np.uint32(raw[i, 6 + j] >> 4) | (high >> np.uint32(16 + j) & np.uint32(1)) << np.uint32(4)
            out[i, 16 + j] = scale * (np.float32(code) - _SIXTEEN)


@compiled
def q5_1(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, low, high = _half(raw, i, 0, halves), _half(raw, i, 2, halves), _double_word(raw, i, 4)
        for j in range(16):
            code = np.uint32(raw[i, 8 + j] & 15) | (high >> np.uint32(j) & np.uint32(1)) << np.uint32(4)
            out[i, j] = scale * np.float32(code) + low
        for j in range(16):
            code = np.uint32(raw[i, 8 + j] >> 4) | (high >> np.uint32(16 + j) & np.uint32(1)) << np.uint32(4)
            out[i, 16 + j] = scale * np.float32(code) + low


@compiled
def q8_0(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for j in range(32):
            out[i, j] = scale * np.float32(np.int8(raw[i, 2 + j]))


@compiled
def q2_k(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, low = _half(raw, i, 80, halves), _half(raw, i, 82, halves)
        for b in range(16):
            factor = scale * np.float32(raw[i, b] & 15)
            less = low * np.float32(raw[i, b] >> 4)
            place, shift = 16 + 32 * (b // 8) + 16 * (b % 2), np.uint8(2 * (b // 2 % 4))
            for j in range(16):
                out[i, 16 * b + j] = factor * np.float32(raw[i, place + j] >> shift & 3) - less


@compiled
def q3_k(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 108, halves)
        for b in range(16):
            low = raw[i, 96 + b % 8] >> np.uint8(4 * (b // 8)) & 15
            high = raw[i, 104 + b % 4] >> np.uint8(2 * (b // 4)) & 3
            factor = scale * (np.float32(low | high << 4) - _32)
            place, shift = 32 + 32 * (b // 8) + 16 * (b % 2), np.uint32(2 * (b // 2 % 4))
            mask, bit = 16 * (b % 2), np.uint32(b // 2)
            for j in range(16):
                low_bits = np.uint32(raw[i, place + j]) >> shift & _THREE
                code = np.int32(low_bits | (np.uint32(raw[i, mask + j]) >> bit & _1) << _TWO_BITS)
                out[i, 16 * b + j] = factor * (np.float32(code) - _FOUR)


@compiled
def _scale_6(raw: Array, i: int, place: int, b: int) -> Any:
    """Number `b` of eight 6-bit numbers: scales of q4_k at byte 4, mins at byte 8."""
    if b < 4:
        return np.float32(raw[i, place + b] & 63)
    shift = np.uint8(0) if place == 4 else np.uint8(4)
    return np.float32(raw[i, 8 + b] >> shift & 15 | raw[i, place + b - 4] >> 2 & 48)


@compiled
def q4_k(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, low = _half(raw, i, 0, halves), _half(raw, i, 2, halves)
        for b in range(8):
            factor, less = scale * _scale_6(raw, i, 4, b), low * _scale_6(raw, i, 8, b)
            place, shift = 16 + 32 * (b // 2), np.uint8(4 * (b % 2))
            for j in range(32):
                out[i, 32 * b + j] = factor * np.float32(raw[i, place + j] >> shift & 15) - less


@compiled
def q5_k(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, low = _half(raw, i, 0, halves), _half(raw, i, 2, halves)
        for b in range(8):
            factor, less = scale * _scale_6(raw, i, 4, b), low * _scale_6(raw, i, 8, b)
            place, shift, bit = 48 + 32 * (b // 2), np.uint8(4 * (b % 2)), np.uint8(b)
            for j in range(32):
                code = raw[i, place + j] >> shift & 15 | (raw[i, 16 + j] >> bit & 1) << 4
                out[i, 32 * b + j] = factor * np.float32(code) - less


@compiled
def q6_k(raw: Array, halves: Array, table: Array, out: Array) -> None:
    codes = np.empty(32, np.uint8)
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 208, halves)
        for b in range(8):
            place, shift = 64 * (b // 4) + 32 * (b % 2), np.uint32(4 * (b // 2 % 2))
            above, bits = 128 + 32 * (b // 4), np.uint32(2 * (b % 4))
            for j in range(32):
                low = np.uint32(raw[i, place + j]) >> shift & _FIFTEEN
                codes[j] = np.uint8(low | (np.uint32(raw[i, above + j]) >> bits & _THREE) << _FOUR_BITS)
            for part in range(2):
                factor = scale * np.float32(np.int8(raw[i, 192 + 2 * b + part]))
                for j in range(16):
                    out[i, 32 * b + 16 * part + j] = factor * (np.float32(codes[16 * part + j]) - _32)


@compiled
def tq1_0(raw: Array, halves: Array, table: Array, out: Array) -> None:
    """`table` has the five digits less 1 of every byte, [5, 256]."""
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 52, halves)
        for digit in range(5):
            for j in range(32):
                out[i, 32 * digit + j] = scale * table[digit, raw[i, j]]
            for j in range(16):
                out[i, 160 + 16 * digit + j] = scale * table[digit, raw[i, 32 + j]]
        for digit in range(4):
            for j in range(4):
                out[i, 240 + 4 * digit + j] = scale * table[digit, raw[i, 48 + j]]


@compiled
def tq2_0(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 64, halves)
        for b in range(8):
            place, shift = 32 * (b // 4), np.uint8(2 * (b % 4))
            for j in range(32):
                out[i, 32 * b + j] = scale * (np.float32(raw[i, place + j] >> shift & 3) - _ONE)


@compiled
def _nibbles(
    raw: Array, i: int, place: int, count: int, factor: Any, values: Array, out: Array, start: int
) -> None:
    for j in range(count):
        out[i, start + j] = factor * values[raw[i, place + j] & 15]
    for j in range(count):
        out[i, start + count + j] = factor * values[raw[i, place + j] >> 4]


@compiled
def mxfp4(raw: Array, halves: Array, table: Array, out: Array) -> None:
    """`table` has the 256 scales, then the 16 values."""
    values = table[256:]
    for i in range(raw.shape[0]):
        _nibbles(raw, i, 1, 16, table[raw[i, 0]], values, out, 0)


@compiled
def nvfp4(raw: Array, halves: Array, table: Array, out: Array) -> None:
    values = table[256:]
    for i in range(raw.shape[0]):
        for b in range(4):
            _nibbles(raw, i, 4 + 8 * b, 8, table[raw[i, b]], values, out, 16 * b)


@compiled
def iq4_nl(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        _nibbles(raw, i, 2, 16, _half(raw, i, 0, halves), table, out, 0)


@compiled
def iq4_xs(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale, high = _half(raw, i, 0, halves), _word(raw, i, 2)
        for b in range(8):
            low = np.uint32(raw[i, 4 + b // 2] >> np.uint8(4 * (b % 2)) & 15)
            number = low | (high >> np.uint32(2 * b) & np.uint32(3)) << np.uint32(4)
            _nibbles(raw, i, 8 + 16 * b, 16, scale * (np.float32(number) - _32), table, out, 32 * b)


@compiled
def _with_parity(signs: Any) -> Any:
    """Seven signs and an eighth that makes the number of negative ones even."""
    signs &= np.uint32(127)
    parity = signs ^ signs >> np.uint32(4)
    parity ^= parity >> np.uint32(2)
    parity ^= parity >> np.uint32(1)
    return signs | (parity & np.uint32(1)) << np.uint32(7)


@compiled
def _entry(table: Array, index: Any, factor: Any, signs: Any, out: Array, i: int, start: int) -> None:
    """A table's entry times a factor, negated where a bit of `signs` is set."""
    for j in range(table.shape[1]):
        sign = _ONE - np.float32((signs >> np.uint32(j) & np.uint32(1)) << np.uint32(1))
        out[i, start + j] = factor * table[index, j] * sign


@compiled
def _quarter(scale: Any, number: Any) -> Any:
    return scale * (_HALF + np.float32(number)) * _QUARTER


@compiled
def iq2_xxs(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for b in range(8):
            word = _double_word(raw, i, 6 + 8 * b)
            factor = _quarter(scale, word >> np.uint32(28))
            for part in range(4):
                signs = _with_parity(word >> np.uint32(7 * part))
                _entry(table, raw[i, 2 + 8 * b + part], factor, signs, out, i, 32 * b + 8 * part)


@compiled
def iq2_xs(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for part in range(32):
            word = _word(raw, i, 2 + 2 * part)
            factor = _quarter(scale, raw[i, 66 + part // 4] >> np.uint8(4 * (part // 2 % 2)) & 15)
            signs = _with_parity(word >> np.uint32(9))
            _entry(table, word & np.uint32(511), factor, signs, out, i, 8 * part)


@compiled
def iq2_s(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for part in range(32):
            high = np.uint32(raw[i, 66 + part // 4] >> np.uint8(2 * (part % 4)) & 3)
            factor = _quarter(scale, raw[i, 74 + part // 4] >> np.uint8(4 * (part // 2 % 2)) & 15)
            index = np.uint32(raw[i, 2 + part]) | high << np.uint32(8)
            _entry(table, index, factor, np.uint32(raw[i, 34 + part]), out, i, 8 * part)


@compiled
def iq3_xxs(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for b in range(8):
            word = _double_word(raw, i, 66 + 4 * b)
            factor = scale * (_HALF + np.float32(word >> np.uint32(28))) * _HALF
            for part in range(8):
                signs = _with_parity(word >> np.uint32(7 * (part // 2))) >> np.uint32(4 * (part % 2))
                _entry(table, raw[i, 2 + 8 * b + part], factor, signs, out, i, 32 * b + 4 * part)


@compiled
def iq3_s(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for part in range(64):
            number = raw[i, 106 + part // 16] >> np.uint8(4 * (part // 8 % 2)) & 15
            factor = scale * (_ONE + np.float32(number << 1))
            high = np.uint32(raw[i, 66 + part // 8] >> np.uint8(part % 8) & 1)
            index = np.uint32(raw[i, 2 + part]) | high << np.uint32(8)
            signs = np.uint32(raw[i, 74 + part // 2] >> np.uint8(4 * (part % 2)))
            _entry(table, index, factor, signs, out, i, 4 * part)


@compiled
def _shifted(table: Array, index: Any, factor: Any, is_negative: Any, out: Array, i: int, start: int) -> None:
    shift = _EIGHTH - np.float32(is_negative) * _QUARTER
    for j in range(8):
        out[i, start + j] = factor * (table[index, j] + shift)


@compiled
def iq1_s(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        scale = _half(raw, i, 0, halves)
        for b in range(8):
            word = _word(raw, i, 34 + 2 * b)
            factor = scale * np.float32((word >> np.uint32(12) & np.uint32(7)) << np.uint32(1) | np.uint32(1))
            for part in range(4):
                high = word >> np.uint32(3 * part) & np.uint32(7)
                index = np.uint32(raw[i, 2 + 4 * b + part]) | high << np.uint32(8)
                _shifted(table, index, factor, word >> np.uint32(15), out, i, 32 * b + 8 * part)


@compiled
def iq1_m(raw: Array, halves: Array, table: Array, out: Array) -> None:
    for i in range(raw.shape[0]):
        bits = np.uint32(0)
        for part in range(4):
            bits |= _word(raw, i, 48 + 2 * part) >> np.uint32(12) << np.uint32(4 * part)
        for part in range(32):
            number = _word(raw, i, 48 + 2 * (part // 8)) >> np.uint32(3 * (part // 2 % 4)) & np.uint32(7)
            factor = halves[bits] * np.float32(number << np.uint32(1) | np.uint32(1))
            high = np.uint32(raw[i, 32 + part // 2] >> np.uint8(4 * (part % 2)))
            index = np.uint32(raw[i, part]) | (high & np.uint32(7)) << np.uint32(8)
            _shifted(table, index, factor, high >> np.uint32(3) & np.uint32(1), out, i, 8 * part)


LOOPS: Mapping[str, Callable[[Array, Array, Array, Array], None]] = {
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
    "q8_0": q8_0,
    "q2_k": q2_k,
    "q3_k": q3_k,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
    "tq1_0": tq1_0,
    "tq2_0": tq2_0,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "iq4_nl": iq4_nl,
    "iq4_xs": iq4_xs,
    "iq2_xxs": iq2_xxs,
    "iq2_xs": iq2_xs,
    "iq2_s": iq2_s,
    "iq3_xxs": iq3_xxs,
    "iq3_s": iq3_s,
    "iq1_s": iq1_s,
    "iq1_m": iq1_m,
}
