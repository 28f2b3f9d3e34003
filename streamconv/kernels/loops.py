"""Loops compiled by numba: whole blocks, each in one go while it lies in the first-level cache.

They equal the torch kernels bit for bit: numba may neither reorder nor fuse floating point operations (`fastmath` is
off), every operation is rounded to float32 as torch rounds it, and sums have a fixed order.

LLVM makes vector instructions of a loop if its index cannot be negative, its length is known or the loop is long,
nothing in it branches, and integers are as wide as the floats they come from: hence arrays of two axes, 64 written
out, and bytes narrowed in loops of their own. Loops do not hold the GIL. numba keeps machine code beside Python's own
`.pyc` files, or in the user's cache folder if the installation cannot be written to; it is made for one processor and
one state of this file, and is compiled again for another.

`values` and the like are [blocks, block].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.grids import SMALLEST_DIVISOR
from streamconv.kernels.machine_code import compiled

Array = NDArray[Any]


_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_FLOOR = np.float32(SMALLEST_DIVISOR)
_ZERO, _ONE, _EIGHT, _ONE_HALF = np.float32(0), np.float32(1), np.float32(8), np.float32(0.5)
# E4M3 in units of 512: bits of the greatest value and of the least normal number, and what is left of the exponent's
# bias; below it there are multiples of 2^-18, float32's own steps from 32 to 64.
_E4M3_GREATEST, _E4M3_LEAST_NORMAL, _E4M3_BIAS = (
    np.uint32(0x3F600000),
    np.uint32(112 << 23),
    np.uint32(111 << 3),
)
_E4M3_STEP, _E4M3_STEPS = np.float32(2.0**-18), np.float32(2.0**18)
_THIRTY_TWO, _THIRTY_TWO_BITS = np.float32(32), np.uint32(0x42000000)
_TWENTY, _HALF_DROPPED, _SIGN = np.uint32(20), np.uint32(0x7FFFF), np.uint32(0x80)
# Places among values in rising order: of 0, the middle of 253.
E4M3_MIDDLE = np.int32(126)
_STRETCH = 512
_GAMMA, _MIX_1, _MIX_2 = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@compiled
def absmax_64(bits: Array, scale_bits: Array) -> None:
    """Bits of the greatest magnitude: as integers they are ordered as the floats are, NaN above all."""
    for b in range(bits.shape[0]):
        greatest = np.uint32(0)
        for j in range(64):
            magnitude = np.uint32(bits[b, j] & _MAGNITUDE)
            greatest = magnitude if magnitude > greatest else greatest
        scale_bits[b] = greatest


@compiled
def absmax(bits: Array, scale_bits: Array) -> None:
    for b in range(bits.shape[0]):
        greatest = np.uint32(0)
        for j in range(bits.shape[1]):
            magnitude = np.uint32(bits[b, j] & _MAGNITUDE)
            greatest = magnitude if magnitude > greatest else greatest
        scale_bits[b] = greatest


@compiled
def factor_of(scale: Any, peak: Any, floor: Any) -> Any:
    """Factor that `divide_by_scales` multiplies a whole block by."""
    size = abs(scale)
    size = size if size > floor else floor
    return np.float32(np.float32(_ONE / np.float32(np.copysign(size, scale))) * peak)


@compiled
def _either(condition: bool, yes: Any, no: Any) -> Any:
    return yes if condition else no


@compiled
def _counted(x: Any, threshold: Any, rank: Any) -> Any:
    following = rank + _ONE
    return following if x > threshold else rank


@compiled
def rank_of(x: Any, thresholds: Array) -> Any:
    """Count of the 15 rising thresholds that lie below `x`, as float32.

    Of two halves, one is chosen and then counted through: half the time of counting through all, or of looking a value
    up. All thresholds are read before they are compared, for LLVM makes selects, and vectors, only of what it may
    always read.
    """
    t = thresholds
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    is_high = x > t7
    rank = _either(is_high, _EIGHT, _ZERO)
    rank = _counted(x, _either(is_high, t8, t0), rank)
    rank = _counted(x, _either(is_high, t9, t1), rank)
    rank = _counted(x, _either(is_high, t10, t2), rank)
    rank = _counted(x, _either(is_high, t11, t3), rank)
    rank = _counted(x, _either(is_high, t12, t4), rank)
    rank = _counted(x, _either(is_high, t13, t5), rank)
    return _counted(x, _either(is_high, t14, t6), rank)


@compiled
def _at_rank(x: Any, thresholds: Array, choices: Array) -> Any:
    """Entry of `choices` at the rank of `x`, found as `rank_of` finds it."""
    t = thresholds
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    c = choices
    c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
    c8, c9, c10, c11, c12, c13, c14, c15 = c[8], c[9], c[10], c[11], c[12], c[13], c[14], c[15]
    is_high = x > t7
    chosen = _either(is_high, c8, c0)
    chosen = _either(x > _either(is_high, t8, t0), _either(is_high, c9, c1), chosen)
    chosen = _either(x > _either(is_high, t9, t1), _either(is_high, c10, c2), chosen)
    chosen = _either(x > _either(is_high, t10, t2), _either(is_high, c11, c3), chosen)
    chosen = _either(x > _either(is_high, t11, t3), _either(is_high, c12, c4), chosen)
    chosen = _either(x > _either(is_high, t12, t4), _either(is_high, c13, c5), chosen)
    chosen = _either(x > _either(is_high, t13, t5), _either(is_high, c14, c6), chosen)
    return _either(x > _either(is_high, t14, t6), _either(is_high, c15, c7), chosen)


@compiled
def rename(codes: Array, by_rank: Array) -> None:
    for i in range(codes.size):
        codes[i] = by_rank[codes[i]]


@compiled
def nearest_table(values: Array, scales: Array, midpoints: Array, ranks: Array) -> None:
    wide = np.empty(64, np.float32)
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        for j in range(64):
            wide[j] = rank_of(values[b, j] * factor, midpoints)
        for j in range(64):
            ranks[b, j] = np.uint8(np.int32(wide[j]))


@compiled
def nearest_in_any_table(values: Array, scales: Array, midpoints: Array, ranks: Array) -> None:
    """Find ranks by binary search among 255 midpoints."""
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        for j in range(values.shape[1]):
            x = values[b, j] * factor
            rank = np.uint32(0)
            step = np.uint32(128)
            while step:
                rank += step * np.uint32(x > midpoints[rank + step - np.uint32(1)])
                step >>= np.uint32(1)
            ranks[b, j] = rank


@compiled
def e4m3_nearest(x: Array, bits: Array, shifted: Array, shifted_bits: Array, wide: Array) -> None:
    """Codes (uint32) of the values nearest to `x`, in units of 512; ties go to even, and 0 has no sign.

    `bits` are those of `x`, `shifted` and `shifted_bits` the same memory. NaN counts as the least number.
    """
    for j in range(x.size):
        shifted[j] = abs(x[j]) + _THIRTY_TWO
    for j in range(x.size):
        magnitude = np.uint32(bits[j] & _MAGNITUDE)
        sign = np.uint32(bits[j] >> np.uint32(24)) & _SIGN
        sign = sign if magnitude <= _INFINITY else _SIGN
        magnitude = magnitude if magnitude < _E4M3_GREATEST else _E4M3_GREATEST
        normal = np.uint32(magnitude + _HALF_DROPPED + (np.uint32(magnitude >> _TWENTY) & np.uint32(1)))
        normal = np.uint32(normal >> _TWENTY) - _E4M3_BIAS
        small = np.uint32(shifted_bits[j] - _THIRTY_TWO_BITS)
        code = small if magnitude < _E4M3_LEAST_NORMAL else normal
        wide[j] = code | sign if code else code


@compiled
def nearest_e4m3(values: Array, scales: Array, codes: Array) -> None:
    x, shifted, wide = (
        np.empty(_STRETCH, np.float32),
        np.empty(_STRETCH, np.float32),
        np.empty(_STRETCH, np.uint32),
    )
    bits, shifted_bits = x.view(np.uint32), shifted.view(np.uint32)
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        for first in range(0, values.shape[1], _STRETCH):
            last = min(first + _STRETCH, values.shape[1])
            given, into, n = values[b, first:last], codes[b, first:last], last - first
            for j in range(n):
                x[j] = given[j] * factor
            e4m3_nearest(x[:n], bits, shifted, shifted_bits, wide)
            for j in range(n):
                into[j] = np.uint8(wide[j])


@compiled
def _e4m3_towards_zero(x: Array, bits: Array, low: Array, gap: Array, wide: Array) -> None:
    """Magnitudes of the values next to `x` towards 0, their distance from the next, and their codes (int32).

    `bits` are those of `x`; `low` and `gap` are float32.
    """
    low_bits, gap_bits = low.view(np.uint32), gap.view(np.uint32)
    for j in range(x.size):
        magnitude = np.uint32(bits[j] & _MAGNITUDE)
        low_bits[j] = np.uint32(magnitude >> _TWENTY) << _TWENTY
        gap_bits[j] = np.uint32(np.uint32(magnitude >> np.uint32(23)) - np.uint32(3)) << np.uint32(23)
        wide[j] = np.int32(magnitude >> _TWENTY) - np.int32(_E4M3_BIAS)
    for j in range(x.size):
        small = np.int32(abs(x[j]) * _E4M3_STEPS)
        is_small = wide[j] < np.int32(8)
        wide[j] = small if is_small else wide[j]
        low[j] = np.float32(small) * _E4M3_STEP if is_small else low[j]
        gap[j] = _E4M3_STEP if is_small else gap[j]


@compiled
def _e4m3_drawn(x: Array, noise: Array, low: Array, gap: Array, wide: Array) -> None:
    """Codes, in `wide`, of `x` rounded up or down as `noise` has it, from what `_e4m3_towards_zero` found."""
    for j in range(x.size):
        size, step = low[j], gap[j]
        is_negative = x[j] < _ZERO
        is_between = abs(x[j]) > size
        beyond = np.float32(size + step) if is_between else size
        bottom = -beyond if is_negative else size
        goes_up = step * noise[j] < x[j] - bottom
        is_farther = is_between and (not goes_up if is_negative else goes_up)
        code = wide[j] + np.int32(is_farther)
        wide[j] = code | np.int32(0x80) if is_negative and code > np.int32(0) else code


@compiled
def stochastic_e4m3(
    values: Array,
    scales: Array,
    start: Array,
    base: Array,
    has_start: bool,
    noise: Array,
    by_code: Array,
    codes: Array,
) -> None:
    """A code that stands for the value of `start` is that of `start`: -0 stays."""
    x, low, gap = (
        np.empty(_STRETCH, np.float32),
        np.empty(_STRETCH, np.float32),
        np.empty(_STRETCH, np.float32),
    )
    bits, wide = x.view(np.uint32), np.empty(_STRETCH, np.int32)
    greatest = by_code[0x7E]
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        for first in range(0, values.shape[1], _STRETCH):
            n = min(_STRETCH, values.shape[1] - first)
            stretch = slice(first, first + n)
            given, before, old, drawn, into = (
                values[b, stretch],
                base[b, stretch],
                start[b, stretch],
                noise[b, stretch],
                codes[b, stretch],
            )
            if has_start:
                for j in range(n):
                    low[j] = by_code[old[j]]
                for j in range(n):
                    x[j] = (given[j] - before[j]) * factor + low[j]
            else:
                for j in range(n):
                    x[j] = given[j] * factor
            for j in range(n):
                inside = x[j] if x[j] > -greatest else -greatest
                x[j] = inside if inside < greatest else greatest
            _e4m3_towards_zero(x[:n], bits, low, gap, wide)
            _e4m3_drawn(x[:n], drawn, low, gap, wide)
            if has_start:
                for j in range(n):
                    code, own = wide[j], np.int32(old[j])
                    is_zero = code == np.int32(0) and own == np.int32(0x80)
                    is_nan = own & np.int32(0x7F) == np.int32(0x7F) and code == own - np.int32(1)
                    wide[j] = own if is_zero or is_nan else code
            for j in range(n):
                into[j] = np.uint8(wide[j])


@compiled
def decode_e4m3(codes: Array, scales: Array, bits: Array, values: Array) -> None:
    """`bits` and `values` are the same memory."""
    for b in range(values.shape[0]):
        scale = scales[b]
        for j in range(values.shape[1]):
            code = np.uint32(codes[b, j])
            size = code & np.uint32(0x7F)
            size = size if size < np.uint32(0x7E) else np.uint32(0x7E)
            bits[b, j] = np.uint32(size << _TWENTY) + np.uint32(_E4M3_BIAS << _TWENTY)
        for j in range(values.shape[1]):
            signed = np.int32(codes[b, j])
            place = signed & np.int32(0x7F)
            small = np.float32(place) * _E4M3_STEP
            value = small if place < np.int32(8) else values[b, j]
            values[b, j] = (-value if signed > np.int32(0x7F) else value) * scale


@compiled
def nearest_integer(values: Array, scales: Array, peak: Any, floor: Any, codes: Array) -> None:
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], peak, floor)
        for j in range(values.shape[1]):
            x = np.rint(values[b, j] * factor)
            x = x if x < peak else peak
            x = x if x > -peak else -peak
            codes[b, j] = np.uint8(np.int32(x))


@compiled
def uniform_level(x: Any, half: Any) -> Any:
    """The nearest integer to `x` * `half`, a product with a power of two: exact, as is a comparison with a tie."""
    x = x * half
    level = np.rint(x)
    level -= np.float32(level - x == _ONE_HALF)
    level = level if level > -half else -half
    return level if level < half - _ONE else half - _ONE


@compiled
def nearest_uniform(values: Array, scales: Array, half: Any, codes: Array) -> None:
    """Code c stands for c / `half` - 1; a tie gets the lower value."""
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        for j in range(values.shape[1]):
            codes[b, j] = np.uint8(np.int32(uniform_level(values[b, j] * factor, half) + half))


@compiled
def stochastic_table(
    values: Array,
    scales: Array,
    start: Array,
    base: Array,
    has_start: bool,
    noise: Array,
    rising: Array,
    gaps: Array,
    by_code: Array,
    ranks: Array,
) -> None:
    """`rising` is +inf beyond the greatest value; `gaps` are 0 there and at it."""
    x, low, gap = np.empty(64, np.float32), np.empty(64, np.float32), np.empty(64, np.float32)
    wide = np.empty(64, np.uint32)
    least, greatest = np.float32(by_code.min()), np.float32(by_code.max())
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        if has_start:
            for j in range(64):
                low[j] = by_code[start[b, j]]
            for j in range(64):
                x[j] = (values[b, j] - base[b, j]) * factor + low[j]
        else:
            for j in range(64):
                x[j] = values[b, j] * factor
        for j in range(64):
            inside = x[j] if x[j] > least else least
            inside = inside if inside < greatest else greatest
            x[j] = inside
            rank = np.uint32(0)
            for step in range(1, 16):
                rank += np.uint32(inside >= rising[step])
            wide[j] = rank
        for j in range(64):
            low[j] = rising[wide[j]]
            gap[j] = gaps[wide[j]]
        for j in range(64):
            ranks[b, j] = wide[j] + np.uint32(gap[j] * noise[b, j] < x[j] - low[j])


@compiled
def stochastic_uniform(
    values: Array,
    scales: Array,
    start: Array,
    base: Array,
    has_start: bool,
    noise: Array,
    half: Any,
    codes: Array,
) -> None:
    least, greatest = -half, half - _ONE
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], _ONE, _FLOOR)
        for j in range(values.shape[1]):
            x = np.float32(values[b, j] * factor) * half
            if has_start:
                moved = np.float32((values[b, j] - base[b, j]) * factor) * half
                x = moved + (np.float32(start[b, j]) - half)
            x = x if x > least else least
            x = x if x < greatest else greatest
            low = np.floor(x)
            gap = np.ceil(x) - low
            codes[b, j] = np.uint8(np.int32(low + half) + np.int32(gap * noise[b, j] < x - low))


@compiled
def stochastic_integer(
    values: Array,
    scales: Array,
    start: Array,
    base: Array,
    has_start: bool,
    noise: Array,
    peak: Any,
    floor: Any,
    codes: Array,
) -> None:
    for b in range(values.shape[0]):
        factor = factor_of(scales[b], peak, floor)
        for j in range(values.shape[1]):
            x = values[b, j] * factor
            if has_start:
                x = (values[b, j] - base[b, j]) * factor + np.float32(start[b, j])
            x = x if x > -peak else -peak
            x = x if x < peak else peak
            low = np.floor(x)
            gap = np.ceil(x) - low
            codes[b, j] = np.uint8(np.int32(low) + np.int32(gap * noise[b, j] < x - low))


@compiled
def words(key: Any, first: Any, words: Array) -> None:
    for i in range(words.size):
        word = key + (first + np.uint64(i)) * _GAMMA
        word = (word ^ (word >> np.uint64(30))) * _MIX_1
        word = (word ^ (word >> np.uint64(27))) * _MIX_2
        words[i] = word ^ (word >> np.uint64(31))


@compiled
def fractions(halves: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = np.float32(np.int32(halves[i] >> np.uint32(8))) * np.float32(2.0**-24)


@compiled
def pack(pairs: Array, low_first: bool, out: Array) -> None:
    """`pairs` of codes as one little-endian uint16 each."""
    nibble, byte = np.uint16(4), np.uint16(8)
    if low_first:
        for i in range(out.size):
            out[i] = np.uint8(pairs[i] | pairs[i] >> nibble)
    else:
        for i in range(out.size):
            out[i] = np.uint8(pairs[i] << nibble | pairs[i] >> byte)


@compiled
def unpack(packed: Array, low_first: bool, pairs: Array) -> None:
    nibble, byte, mask = np.uint16(4), np.uint16(8), np.uint16(15)
    if low_first:
        for i in range(packed.size):
            both = np.uint16(packed[i])
            pairs[i] = both & mask | both >> nibble << byte
    else:
        for i in range(packed.size):
            both = np.uint16(packed[i])
            pairs[i] = both >> nibble | (both & mask) << byte


@compiled
def turn_words(words: Array, out: Array) -> None:
    """Transpose by squares that lie in the first-level cache on both sides."""
    for first in range(0, words.shape[0], 16):
        last = min(first + 16, words.shape[0])
        for left in range(0, words.shape[1], 16):
            for c in range(left, min(left + 16, words.shape[1])):
                for r in range(first, last):
                    out[c, r] = words[r, c]


@compiled
def turn_codes(words: Array, places: Array, out: Array) -> None:
    """Words [8 n, m], out [8 m, n]; some columns at a time, of all rows."""
    for left in range(0, words.shape[1], 16):
        for n in range(out.shape[1]):
            for m in range(left, min(left + 16, words.shape[1])):
                for i in range(8):
                    word, shift = np.uint32(0), np.uint32(4 * i)
                    for p in range(8):
                        code = words[8 * n + places[p], m] >> shift & np.uint32(15)
                        word |= code << np.uint32(4 * p)
                    out[8 * m + i, n] = word


@compiled
def turn_codes_back(words: Array, places: Array, out: Array) -> None:
    """Words [8 m, n], out [8 n, m]."""
    for left in range(0, out.shape[1], 16):
        for n in range(words.shape[1]):
            for m in range(left, min(left + 16, out.shape[1])):
                for p in range(8):
                    word, shift = np.uint32(0), np.uint32(4 * p)
                    for i in range(8):
                        code = words[8 * m + i, n] >> shift & np.uint32(15)
                        word |= code << np.uint32(4 * i)
                    out[8 * n + places[p], m] = word


@compiled
def to_bfloat16(bits: Array) -> None:
    """Round to nearest, ties to even, in place; what is not finite stays so."""
    for b in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            word = bits[b, j]
            odd = np.uint32(word >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(word + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
            bits[b, j] = word if (word & _INFINITY) == _INFINITY else rounded


@compiled
def decode_pairs(packed: Array, pairs: Array, scales: Array, both: Array, values: Array) -> None:
    """`both` and `values` are the same memory, as two float32 and as one."""
    for b in range(values.shape[0]):
        for j in range(packed.shape[1]):
            both[b, j] = pairs[packed[b, j]]
        for j in range(values.shape[1]):
            values[b, j] *= scales[b]


@compiled
def decode_table(codes: Array, by_code: Array, scales: Array, values: Array) -> None:
    for b in range(values.shape[0]):
        for j in range(values.shape[1]):
            values[b, j] = by_code[codes[b, j]]
        for j in range(values.shape[1]):
            values[b, j] *= scales[b]


@compiled
def decode_uniform(codes: Array, half: Any, scales: Array, values: Array) -> None:
    """`decode_table` of the grid of `nearest_uniform`, without looking up."""
    step = _ONE / half
    for b in range(values.shape[0]):
        scale = scales[b]
        for j in range(values.shape[1]):
            values[b, j] = (np.float32(codes[b, j]) - half) * step * scale


@compiled
def decode_integer(codes: Array, scales: Array, inverse_peak: Any, values: Array) -> None:
    for b in range(values.shape[0]):
        scale = scales[b]
        for j in range(values.shape[1]):
            values[b, j] = np.float32(np.float32(codes[b, j]) * scale) * inverse_peak


@compiled
def tree_sum(terms: Array) -> Any:
    """`pairwise_sum`, in place."""
    count = terms.size
    while count > 1:
        half = (count + 1) // 2
        upper = terms[half:count]
        for j in range(upper.size):
            terms[j] += upper[j]
        count = half
    return terms[0]


@compiled
def _tree_sum_64(terms: Array) -> Any:
    """`tree_sum` of 64."""
    for j in range(32):
        terms[j] += terms[j + 32]
    for j in range(16):
        terms[j] += terms[j + 16]
    for j in range(8):
        terms[j] += terms[j + 8]
    for j in range(4):
        terms[j] += terms[j + 4]
    return (terms[0] + terms[2]) + (terms[1] + terms[3])


@compiled
def _levels(values: Array, scale: Any, midpoints: Array, rising: Array, levels: Array) -> None:
    """Values of the codes nearest to a block's `values`."""
    factor = factor_of(scale, _ONE, _FLOOR)
    for j in range(64):
        levels[j] = _at_rank(values[j] * factor, midpoints, rising)


@compiled
def search(values: Array, factors: Array, steps: int, midpoints: Array, rising: Array, scales: Array) -> None:
    """The first of `factors` is 1."""
    levels, terms = np.empty(64, np.float32), np.empty(64, np.float32)
    for b in range(values.shape[0]):
        block, best, least = values[b], scales[b], np.float32(np.inf)
        for number in range(factors.size + steps):
            if number < factors.size:
                trial = np.float32(scales[b] * factors[number])
            else:
                _levels(block, best, midpoints, rising, levels)
                for j in range(64):
                    terms[j] = block[j] * levels[j]
                inner = _tree_sum_64(terms)
                for j in range(64):
                    terms[j] = levels[j] * levels[j]
                trial = np.float32(inner / _tree_sum_64(terms))
            _levels(block, trial, midpoints, rising, levels)
            for j in range(64):
                error = block[j] - levels[j] * trial
                terms[j] = error * error
            loss = _tree_sum_64(terms)
            if loss < least:
                best, least = trial, loss
        scales[b] = best


@compiled
def _uniform_levels(values: Array, scale: Any, half: Any, levels: Array) -> None:
    factor = factor_of(scale, _ONE, _FLOOR)
    for j in range(values.size):
        levels[j] = uniform_level(values[j] * factor, half) / half


@compiled
def search_uniform(values: Array, factors: Array, steps: int, half: Any, scales: Array) -> None:
    """`search` on the grid of `nearest_uniform`, in blocks of any length."""
    levels, terms = np.empty(values.shape[1], np.float32), np.empty(values.shape[1], np.float32)
    for b in range(values.shape[0]):
        block, best, least = values[b], scales[b], np.float32(np.inf)
        for number in range(factors.size + steps):
            if number < factors.size:
                trial = np.float32(scales[b] * factors[number])
            else:
                _uniform_levels(block, best, half, levels)
                for j in range(block.size):
                    terms[j] = block[j] * levels[j]
                inner = tree_sum(terms)
                for j in range(block.size):
                    terms[j] = levels[j] * levels[j]
                trial = np.float32(inner / tree_sum(terms))
            _uniform_levels(block, trial, half, levels)
            for j in range(block.size):
                error = block[j] - levels[j] * trial
                terms[j] = error * error
            loss = tree_sum(terms)
            if loss < least:
                best, least = trial, loss
        scales[b] = best


@compiled
def _e4m3_levels(
    values: Array, scale: Any, by_code: Array, x: Array, shifted: Array, wide: Array, levels: Array
) -> None:
    factor = factor_of(scale, _ONE, _FLOOR)
    for j in range(values.size):
        x[j] = values[j] * factor
    e4m3_nearest(x, x.view(np.uint32), shifted, shifted.view(np.uint32), wide)
    for j in range(values.size):
        levels[j] = by_code[wide[j]]


@compiled
def search_e4m3(values: Array, factors: Array, steps: int, by_code: Array, scales: Array) -> None:
    """`search` on the grid of `nearest_e4m3`, in blocks of any length."""
    length = values.shape[1]
    levels, terms, x = (
        np.empty(length, np.float32),
        np.empty(length, np.float32),
        np.empty(length, np.float32),
    )
    shifted, wide = np.empty(length, np.float32), np.empty(length, np.uint32)
    for b in range(values.shape[0]):
        block, best, least = values[b], scales[b], np.float32(np.inf)
        for number in range(factors.size + steps):
            if number < factors.size:
                trial = np.float32(scales[b] * factors[number])
            else:
                _e4m3_levels(block, best, by_code, x, shifted, wide, levels)
                for j in range(block.size):
                    terms[j] = block[j] * levels[j]
                inner = tree_sum(terms)
                for j in range(block.size):
                    terms[j] = levels[j] * levels[j]
                trial = np.float32(inner / tree_sum(terms))
            _e4m3_levels(block, trial, by_code, x, shifted, wide, levels)
            for j in range(block.size):
                error = block[j] - levels[j] * trial
                terms[j] = error * error
            loss = tree_sum(terms)
            if loss < least:
                best, least = trial, loss
        scales[b] = best


@compiled
def distance(left: Array, right: Array, sums: Array) -> None:
    terms = np.empty(left.shape[1], np.float32)
    for b in range(left.shape[0]):
        for j in range(left.shape[1]):
            difference = left[b, j] - right[b, j]
            terms[j] = difference * difference
        sums[b] = tree_sum(terms)


@compiled
def kept_table(
    codes: Array, by_code: Array, target: Array, base: Array, anchor: Array, inner: Array, sums: Array
) -> None:
    """`pairwise_sum` of three products at once, the first halving while they are made."""
    values = np.empty(64, np.float32)
    terms = np.empty((3, 32), np.float32)
    for b in range(codes.shape[0]):
        for j in range(64):
            values[j] = by_code[codes[b, j]]
        for j in range(32):
            low, high = target[b, j] - base[b, j], target[b, j + 32] - base[b, j + 32]
            terms[0, j] = values[j] * low + values[j + 32] * high
            terms[1, j] = anchor[b, j] * low + anchor[b, j + 32] * high
            terms[2, j] = low * low + high * high
        for k in range(3):
            for j in range(16):
                terms[k, j] += terms[k, j + 16]
            for j in range(8):
                terms[k, j] += terms[k, j + 8]
            for j in range(4):
                terms[k, j] += terms[k, j + 4]
        inner[b] = (terms[0, 0] + terms[0, 2]) + (terms[0, 1] + terms[0, 3])
        sums[0, b] = (terms[1, 0] + terms[1, 2]) + (terms[1, 1] + terms[1, 3])
        sums[1, b] = (terms[2, 0] + terms[2, 2]) + (terms[2, 1] + terms[2, 3])


@compiled
def kept_in_any_table(
    codes: Array, by_code: Array, target: Array, base: Array, anchor: Array, inner: Array, sums: Array
) -> None:
    terms = np.empty((3, codes.shape[1]), np.float32)
    for b in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            delta = target[b, j] - base[b, j]
            terms[0, j] = by_code[codes[b, j]] * delta
            terms[1, j] = anchor[b, j] * delta
            terms[2, j] = delta * delta
        inner[b] = tree_sum(terms[0])
        sums[0, b] = tree_sum(terms[1])
        sums[1, b] = tree_sum(terms[2])


@compiled
def kept_integer(codes: Array, target: Array, base: Array, anchor: Array, inner: Array, sums: Array) -> None:
    terms = np.empty((3, codes.shape[1]), np.float32)
    for b in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            delta = target[b, j] - base[b, j]
            terms[0, j] = np.float32(codes[b, j]) * delta
            terms[1, j] = anchor[b, j] * delta
            terms[2, j] = delta * delta
        inner[b] = tree_sum(terms[0])
        sums[0, b] = tree_sum(terms[1])
        sums[1, b] = tree_sum(terms[2])
