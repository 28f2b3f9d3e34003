"""Loops for CUDA devices, written in Triton: a launch goes over a cell once, and keeps in registers all between.

They equal the torch kernels bit for bit. Launches say enable_fp_fusion=False, so that neither Triton, LLVM nor ptxas
makes one operation of a product and a sum; divisions are `tl.div_rn`, which PTX has as div.rn.f32 (correctly rounded,
with subnormal numbers), since Triton's own `/` of float32 is an approximation; nothing is flushed to 0; sums are taken
by `folded`. Rounding to bfloat16 and the absolute value of a scale are done on bits. What differs between devices is
the payload of a NaN alone, which no loop looks at: the interpreter has numpy's, a card 0x7FFFFFFF.

Triton's interpreter (TRITON_INTERPRET=1) runs the same functions with numpy, an operation at a time and each rounded
to float32. It shows that the arithmetic is right; that compiled code does no other is seen in its PTX.

A tile is what one program takes. Addresses, and what lies in registers, are all `tl.tensor`. Tables of a grid
are padded, so that a search for a rank needs no bounds: see `in_triton.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Whether Triton runs these functions with numpy; it asks when they are imported.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any]) -> Any:
    """Have Triton compile `function` when it is first launched."""
    return triton.jit(function)


@jit
def in_units(
    values: tl.tensor,
    scales: tl.tensor,
    is_short: tl.tensor,
    PEAK: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
) -> tl.tensor:
    """`values` in units of `scales / PEAK`: see `divide_by_scales`. FLOOR: bits of the least divisor."""
    bits = scales.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # As integers, magnitudes have the same order, with NaN above all: so it stays, as it does in torch.
    divisors = (tl.maximum(size, FLOOR) | (bits ^ size)).to(tl.float32, bitcast=True)
    factors = tl.div_rn(tl.full(divisors.shape, 1.0, tl.float32), divisors)
    if PEAK != 1.0:
        factors = factors * PEAK
    found = values * factors
    if HAS_SHORT:
        divided = tl.div_rn(values, tl.broadcast_to(divisors, values.shape))
        if PEAK != 1.0:
            divided = divided * PEAK
        found = tl.where(is_short, divided, found)
    return found


@jit
def rank_of(x: tl.tensor, thresholds: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """Count of those `thresholds` [2^STEPS - 1], rising, that are less than `x`; 0 for NaN."""
    rank = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(STEPS):
        known = tl.load(thresholds + rank + ((1 << (STEPS - 1 - step)) - 1))
        rank += (known < x).to(tl.int32) << (STEPS - 1 - step)
    return rank


@jit
def to_integer(x: tl.tensor, PEAK: tl.constexpr) -> tl.tensor:
    """The integer (float32) from -PEAK to PEAK that is nearest to `x`, ties to even; 0 for NaN; never -0."""
    x = tl.where(x > PEAK, PEAK, tl.where(x < -PEAK, -PEAK, x))
    x = tl.where(x >= -PEAK, x, 0.0)
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: above it float32 has no fractions


@jit
def nearest_code(
    x: tl.tensor,
    midpoints: tl.tensor,
    names: tl.tensor,
    PEAK: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    IN_ORDER: tl.constexpr,
) -> tl.tensor:
    """Codes (uint8) nearest to `x`; `names` are the codes of ranks."""
    if IS_INTEGER:
        return to_integer(x, PEAK).to(tl.int32).to(tl.uint8)
    rank = rank_of(x, midpoints, STEPS)
    return rank.to(tl.uint8) if IN_ORDER else tl.load(names + rank)


@jit
def value_of(code: tl.tensor, values: tl.tensor, IS_INTEGER: tl.constexpr) -> tl.tensor:
    """Values (float32) of `code` (uint8)."""
    if IS_INTEGER:
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    return tl.load(values + code.to(tl.int32))


@jit
def held(values: tl.tensor, DROPPED: tl.constexpr) -> tl.tensor:
    """`values` as a type holds them that has no room for DROPPED of float32's bits: bfloat16 (16), float16 (13)."""
    if DROPPED == 16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, 0x7FC00000, rounded).to(tl.uint32).to(tl.float32, bitcast=True)
    if DROPPED == 13:
        return values.to(tl.float16).to(tl.float32)
    return values


@jit
def folded(terms: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """Sums over the last axis, of 2^LEVELS terms, the upper half added to the lower until one is left."""
    for level in tl.static_range(LEVELS):
        halves = tl.permute(tl.reshape(terms, (terms.shape[0], 2, 1 << (LEVELS - 1 - level))), (0, 2, 1))
        lower, upper = tl.split(halves)
        terms = lower + upper
    return tl.reshape(terms, (terms.shape[0],))


@jit
def or_nothing(terms: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """`terms`, and -0 in place of those that do not exist; by its bits, as Triton makes 0 of the constant."""
    nothing = tl.full(terms.shape, -2147483648, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(exists, terms, nothing)


@jit
def fold_places(first: tl.tensor, count: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """Places of the terms of sums that LEVELS foldings of `count` terms leave at the places `first`; and which exist.

    Both [sums, 2^LEVELS], in the order of `folded`. Halves are rounded up, so some terms have none to be added to them;
    -0 in its place changes no sum.
    """
    of_sum = tl.arange(0, 1 << LEVELS)[None, :]
    places = first[:, None] + of_sum * 0
    exists = places < ((count + ((1 << LEVELS) - 1)) >> LEVELS)
    for back in tl.static_range(LEVELS):
        half = (count + ((1 << (LEVELS - back)) - 1)) >> (LEVELS - back)
        before = (count + ((1 << (LEVELS - back - 1)) - 1)) >> (LEVELS - back - 1)
        places += ((of_sum >> back) & 1) * half
        exists = exists & (places < before)
    return places, exists


@jit
def encode_blocks(
    values: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    midpoints: tl.tensor,
    names: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PEAK: tl.constexpr,
    REACH: tl.constexpr,
    FLOOR: tl.constexpr,
    SHORT_FLOOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    IN_ORDER: tl.constexpr,
    HAS_CODES: tl.constexpr,
) -> None:
    """Starting scales and, with HAS_CODES, nearest codes of ROWS blocks, each of them padded to WIDTH."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    place = block[:, None] * BLOCK + column
    is_there = (column < BLOCK) & (place < count)
    given = tl.load(values + place, mask=is_there, other=0.0)
    # As integers, magnitudes have the same order, and the greatest of a block with a NaN is NaN.
    size = tl.max(given.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    is_short = (block + 1) * BLOCK > count
    if HAS_SHORT:
        size = tl.where(is_short, tl.maximum(size, SHORT_FLOOR), size)
    scale = size.to(tl.float32, bitcast=True)
    if REACH != 1.0:
        scale = tl.div_rn(scale, tl.full(scale.shape, REACH, tl.float32))
    tl.store(scales + block, scale, mask=block * BLOCK < count)
    if HAS_CODES:
        x = in_units(given, scale[:, None], is_short[:, None], PEAK, FLOOR, HAS_SHORT)
        found = nearest_code(x, midpoints, names, PEAK, STEPS, IS_INTEGER, IN_ORDER)
        tl.store(codes + place, found, mask=is_there)


@jit
def nearest(
    values: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    midpoints: tl.tensor,
    names: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PEAK: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    IN_ORDER: tl.constexpr,
) -> None:
    """Nearest codes with `scales` that are known."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = place < count
    block = place // BLOCK
    given = tl.load(values + place, mask=is_there, other=0.0)
    scale = tl.load(scales + block, mask=is_there, other=1.0)
    x = in_units(given, scale, (block + 1) * BLOCK > count, PEAK, FLOOR, HAS_SHORT)
    found = nearest_code(x, midpoints, names, PEAK, STEPS, IS_INTEGER, IN_ORDER)
    tl.store(codes + place, found, mask=is_there)


@jit
def stochastic(
    values: tl.tensor,
    scales: tl.tensor,
    old_codes: tl.tensor,
    base: tl.tensor,
    noise: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    rising: tl.tensor,
    names: tl.tensor,
    by_code: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PEAK: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    IN_ORDER: tl.constexpr,
    HAS_START: tl.constexpr,
    IS_FLOAT: tl.constexpr,
) -> None:
    """Codes rounded up or down by `noise`, with HAS_START from `old_codes` and their values `base` on."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = place < count
    block = place // BLOCK
    given = tl.load(values + place, mask=is_there, other=0.0)
    scale = tl.load(scales + block, mask=is_there, other=1.0)
    if HAS_START:
        given = given - tl.load(base + place, mask=is_there, other=0.0)
    x = in_units(given, scale, (block + 1) * BLOCK > count, PEAK, FLOOR, HAS_SHORT)
    if HAS_START:
        old = tl.load(old_codes + place, mask=is_there, other=0)
        old_value = value_of(old, by_code, IS_INTEGER)
        x = x + old_value
    x = tl.where(x > GREATEST, GREATEST, tl.where(x < LEAST, LEAST, x))
    if IS_INTEGER:
        # NaN, of which torch makes 0 in the end, is not above anything and keeps the lower one.
        known = tl.where(x >= LEAST, x, 0.0)
        # Not tl.floor and tl.ceil, which flush subnormal numbers to 0: above it there is 1.
        cut = known.to(tl.int32).to(tl.float32)
        low, high = cut - (cut > known).to(tl.float32), cut + (cut < known).to(tl.float32)
        lower, upper = low.to(tl.int32).to(tl.uint8), high.to(tl.int32).to(tl.uint8)
    else:
        above = rank_of(x, rising, STEPS)
        below = above - (tl.load(rising + above) > x).to(tl.int32)
        if IN_ORDER:
            lower, upper = below.to(tl.uint8), above.to(tl.uint8)
        else:
            lower, upper = tl.load(names + below), tl.load(names + above)
        low, high = value_of(lower, by_code, False), value_of(upper, by_code, False)
    drawn = tl.load(noise + place, mask=is_there, other=0.0)
    found = tl.where((high - low) * drawn < x - low, upper, lower)
    if HAS_START and IS_FLOAT:
        found = tl.where(value_of(found, by_code, IS_INTEGER) == old_value, old, found)
    tl.store(codes + place, found, mask=is_there)


@jit
def level_of(
    x: tl.tensor,
    midpoints: tl.tensor,
    rising: tl.tensor,
    PEAK: tl.constexpr,
    PER_PEAK: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
) -> tl.tensor:
    """Values of the codes nearest to `x`, in units of the scale."""
    level = to_integer(x, PEAK) if IS_INTEGER else tl.load(rising + rank_of(x, midpoints, STEPS))
    if PEAK != 1.0:
        level = level * PER_PEAK
    return level


@jit
def loss_of(
    values: tl.tensor, weights: tl.tensor, levels: tl.tensor, scale: tl.tensor, LEVELS: tl.constexpr
) -> tl.tensor:
    """Squared error of every block, weighed by `weights`."""
    error = values - levels * scale[:, None]
    return folded(error * (error * weights), LEVELS)


@jit
def search(
    values: tl.tensor,
    weights: tl.tensor,
    factors: tl.tensor,
    scales: tl.tensor,
    count: tl.tensor,
    midpoints: tl.tensor,
    rising: tl.tensor,
    FACTORS: tl.constexpr,
    FITS: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    PEAK: tl.constexpr,
    PER_PEAK: tl.constexpr,
    REACH: tl.constexpr,
    FLOOR: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
) -> None:
    """Scales with the least squared error of ROWS blocks of 2^LEVELS, of `count`: see Kernels."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = (block[:, None] << LEVELS) + tl.arange(0, 1 << LEVELS)[None, :]
    is_there = (block < count)[:, None]
    given = tl.load(values + place, mask=is_there, other=0.0)
    # A factor of 1 changes no product.
    counts = (
        tl.load(weights + place, mask=is_there, other=1.0)
        if HAS_WEIGHTS
        else tl.full(given.shape, 1.0, tl.float32)
    )
    size = tl.max(given.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    start = size.to(tl.float32, bitcast=True)
    if REACH != 1.0:
        start = tl.div_rn(start, tl.full(start.shape, REACH, tl.float32))
    x = in_units(given, start[:, None], is_there, PEAK, FLOOR, False)
    level = level_of(x, midpoints, rising, PEAK, PER_PEAK, STEPS, IS_INTEGER)
    best, least = start, loss_of(given, counts, level, start, LEVELS)
    for trial in range(FACTORS + FITS):
        if trial < FACTORS:
            scale = start * tl.load(factors + trial)
        else:
            x = in_units(given, best[:, None], is_there, PEAK, FLOOR, False)
            level = level_of(x, midpoints, rising, PEAK, PER_PEAK, STEPS, IS_INTEGER)
            weighed = level * counts
            scale = tl.div_rn(folded(given * weighed, LEVELS), folded(level * weighed, LEVELS))
        x = in_units(given, scale[:, None], is_there, PEAK, FLOOR, False)
        level = level_of(x, midpoints, rising, PEAK, PER_PEAK, STEPS, IS_INTEGER)
        loss = loss_of(given, counts, level, scale, LEVELS)
        best = tl.where(loss < least, scale, best)
        least = tl.where(loss < least, loss, least)
    tl.store(scales + block, best, mask=block < count)


@jit
def decode(
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    by_code: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PEAK: tl.constexpr,
    PER_PEAK: tl.constexpr,
    DROPPED: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    PAIRS: tl.constexpr,
    LOW_FIRST: tl.constexpr,
) -> None:
    """Values of codes times their scales, as a type holds them that lacks DROPPED bits; of PAIRS, two codes a byte."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = place < count
    if PAIRS:
        code = half_of(tl.load(codes + (place >> 1), mask=is_there, other=0), place, LOW_FIRST)
    else:
        code = tl.load(codes + place, mask=is_there, other=0)
    scale = tl.load(scales + place // BLOCK, mask=is_there, other=0.0)
    found = value_of(code, by_code, IS_INTEGER) * scale
    if PEAK != 1.0:
        found = found * PER_PEAK
    tl.store(out + place, held(found, DROPPED), mask=is_there)


@jit
def half_of(byte: tl.tensor, place: tl.tensor, LOW_FIRST: tl.constexpr) -> tl.tensor:
    """Code `place` (its last bit counts) of the two in a byte."""
    is_high = (place & 1) == 1 if LOW_FIRST else (place & 1) == 0
    return tl.where(is_high, byte >> 4, byte & 0xF).to(tl.uint8)


@jit
def unpack_pairs(
    packed: tl.tensor, codes: tl.tensor, count: tl.tensor, TILE: tl.constexpr, LOW_FIRST: tl.constexpr
) -> None:
    """Codes that lie two a byte."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = place < count
    byte = tl.load(packed + (place >> 1), mask=is_there, other=0)
    tl.store(codes + place, half_of(byte, place, LOW_FIRST), mask=is_there)


@jit
def pack_pairs(
    codes: tl.tensor, out: tl.tensor, count: tl.tensor, TILE: tl.constexpr, LOW_FIRST: tl.constexpr
) -> None:
    """Two codes a byte, `count` of them."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = place < count
    first = tl.load(codes + 2 * place, mask=is_there, other=0)
    second = tl.load(codes + 2 * place + 1, mask=is_there, other=0)
    byte = (second << 4) | first if LOW_FIRST else (first << 4) | second
    tl.store(out + place, byte.to(tl.uint8), mask=is_there)


@jit
def uniform(key: tl.int64, first: tl.int64, out: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> None:
    """Numbers of the stream `key` from place `first` on: SplitMix64 in registers, see `rounding/noise.py`."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    number = (place + first).to(tl.uint64)
    word = (number >> 1) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    half = (word >> (8 + 32 * (number & 1))) & 0xFFFFFF
    tl.store(out + place, half.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, mask=place < count)


@jit
def kept(
    codes: tl.tensor,
    target: tl.tensor,
    base: tl.tensor,
    anchor: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    by_code: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
) -> None:
    """Products of D = `target` - `base` with codes' values, `anchor` and itself, folded LEVELS times: [3, `count`].

    `count` is the number of blocks times that of the sums which are left of each.
    """
    LEFT: tl.constexpr = (BLOCK + ((1 << LEVELS) - 1)) >> LEVELS
    found = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places, exists = fold_places(found % LEFT, BLOCK, LEVELS)
    exists = exists & (found < count)[:, None]
    places = places + (found // LEFT)[:, None] * BLOCK
    delta = tl.load(target + places, mask=exists, other=0.0) - tl.load(base + places, mask=exists, other=0.0)
    level = value_of(tl.load(codes + places, mask=exists, other=0), by_code, IS_INTEGER)
    known = tl.load(anchor + places, mask=exists, other=0.0)
    is_there = found < count
    tl.store(sums + found, folded(or_nothing(level * delta, exists), LEVELS), mask=is_there)
    tl.store(sums + count + found, folded(or_nothing(known * delta, exists), LEVELS), mask=is_there)
    tl.store(sums + 2 * count + found, folded(or_nothing(delta * delta, exists), LEVELS), mask=is_there)


@jit
def distance(
    left: tl.tensor,
    right: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """Squares of `left` - `right`, folded LEVELS times, as in `kept`: [`count`]."""
    LEFT: tl.constexpr = (BLOCK + ((1 << LEVELS) - 1)) >> LEVELS
    found = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places, exists = fold_places(found % LEFT, BLOCK, LEVELS)
    exists = exists & (found < count)[:, None]
    places = places + (found // LEFT)[:, None] * BLOCK
    error = tl.load(left + places, mask=exists, other=0.0) - tl.load(right + places, mask=exists, other=0.0)
    tl.store(sums + found, folded(or_nothing(error * error, exists), LEVELS), mask=found < count)


@jit
def fold(
    terms: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    left: tl.tensor,
    total: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
) -> None:
    """Fold rows of `count` terms LEVELS times, in float64 with IS_DOUBLE: `left` sums a row, `total` in all."""
    found = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places, exists = fold_places(found % left, count, LEVELS)
    exists = exists & (found < total)[:, None]
    given = tl.load(terms + places + (found // left)[:, None] * count, mask=exists, other=0.0)
    given = or_nothing(given, exists)
    if IS_DOUBLE:
        given = given.to(tl.float64)
    tl.store(sums + found, folded(given, LEVELS), mask=found < total)
