"""Loops over a tile of columns that are settled one after another, each with the errors of those before.

See `loops.py` for how loops are written. Targets, scales, codes and errors are [columns, rows].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.grids import SMALLEST_DIVISOR
from streamconv.kernels.loops import E4M3_MIDDLE, Array, e4m3_nearest, factor_of, rank_of, uniform_level
from streamconv.kernels.machine_code import compiled

_ZERO, _ONE, _FLOOR = np.float32(0), np.float32(1), np.float32(SMALLEST_DIVISOR)
_THREE_QUARTERS = np.float32(0.75)
_LEAST_NORMAL, _OVERFLOW = np.float32(2.0**-14), np.float32(65520)  # of float16
# Changes of a column's codes in descent after which its rows are gone through one by one.
_FEW_CHANGES = 8


@compiled
def _round_bits(bits: Array, values: Array, width: int, dropped: int) -> None:
    """Round `values`, the same memory as `bits`, to bfloat16 (16 bits dropped) or float16 (13), ties to even."""
    shift, odd = np.uint32(dropped), np.uint32(1)
    half = np.uint32((np.uint32(1) << np.uint32(dropped - 1)) - np.uint32(1))
    mask = np.uint32(0xFFFFFFFF) << np.uint32(dropped)
    if dropped == 13:
        for i in range(width):
            x = values[i]
            # Below its normal numbers float16 has the multiples of 2⁻²⁴, float32's own steps from 0.5 to 1.
            small = np.float32(np.float32(x + _THREE_QUARTERS) - _THREE_QUARTERS)
            values[i] = small if abs(x) < _LEAST_NORMAL else x
        for i in range(width):
            x = values[i]
            values[i] = x if abs(x) < _OVERFLOW else np.float32(np.copysign(np.float32(np.inf), x))
    for i in range(width):
        word = bits[i]
        bits[i] = np.uint32(word + half + ((word >> shift) & odd)) & mask


@compiled
def _e4m3_nearest_ranks(wanted: Array, scales: Array, ranks: Array) -> None:
    x, shifted, wide = np.empty(64, np.float32), np.empty(64, np.float32), np.empty(64, np.uint32)
    for i in range(scales.size):
        x[i] = wanted[i] * factor_of(scales[i], _ONE, _FLOOR)
    e4m3_nearest(x[: scales.size], x.view(np.uint32), shifted, shifted.view(np.uint32), wide)
    for i in range(scales.size):
        code = np.int32(wide[i])
        size = code & np.int32(0x7F)
        ranks[i] = E4M3_MIDDLE - size if code > np.int32(0x7F) else E4M3_MIDDLE + size


@compiled
def _ranks(
    goal: Array, pulled: Array, scales: Array, midpoints: Array, half: Any, wanted: Array, ranks: Array
) -> None:
    """`half` of a grid as `nearest_uniform` has it; of E4M3 -1; else 0."""
    for i in range(goal.size):
        wanted[i] = goal[i] + pulled[i]
    if half < 0:
        _e4m3_nearest_ranks(wanted, scales, ranks)
        return
    if half:
        for i in range(goal.size):
            x = wanted[i] * factor_of(scales[i], _ONE, _FLOOR)
            ranks[i] = np.int32(uniform_level(x, half) + half)
        return
    for i in range(goal.size):
        x = wanted[i] * factor_of(scales[i], _ONE, _FLOOR)
        ranks[i] = np.int32(rank_of(x, midpoints))


@compiled
def _loaded(table: Array, index: Array, scales: Array, dropped: int, bits: Array, values: Array) -> None:
    for i in range(scales.size):
        values[i] = table[index[i]] * scales[i]
    if dropped:
        _round_bits(bits, values, scales.size, dropped)


@compiled
def _change(goal: Array, values: Array, errors: Array, changes: Array) -> bool:
    """The new errors, and how they differ from the old ones; whether any does."""
    moved = False
    for i in range(goal.size):
        error = goal[i] - values[i]
        changes[i] = error - errors[i]
        errors[i] = error
        moved |= changes[i] != 0
    return moved


@compiled
def quantize_columns(
    target: Array,
    pull: Array,
    coupling: Array,
    scales: Array,
    midpoints: Array,
    half: Any,
    rising: Array,
    by_code: Array,
    by_rank: Array,
    codes: Array,
    errors: Array,
    is_first: bool,
    dropped: int,
) -> None:
    """64 rows at a time, so that their part of `pull` stays in the first-level cache."""
    ranks, wanted, changes = np.empty(64, np.int32), np.empty(64, np.float32), np.empty(64, np.float32)
    values, old = np.empty(64, np.float32), np.empty(64, np.float32)
    bits, old_bits = values.view(np.uint32), old.view(np.uint32)
    for first in range(0, target.shape[1], 64):
        last = min(first + 64, target.shape[1])
        for j in range(target.shape[0]):
            goal, scale, code = target[j, first:last], scales[j, first:last], codes[j, first:last]
            _ranks(goal, pull[j, first:last], scale, midpoints, half, wanted, ranks)
            _loaded(rising, ranks, scale, dropped, bits, values)
            if is_first:
                for i in range(goal.size):
                    code[i] = by_rank[ranks[i]]
            else:
                _loaded(by_code, code, scale, dropped, old_bits, old)
                for i in range(goal.size):
                    is_better = abs(wanted[i] - values[i]) < abs(wanted[i] - old[i])
                    values[i] = values[i] if is_better else old[i]
                    code[i] = by_rank[ranks[i]] if is_better else code[i]
            if _change(goal, values, errors[j, first:last], changes):
                for k in range(j + 1, target.shape[0]):
                    weight, pulls = coupling[j, k], pull[k, first:last]
                    for i in range(pulls.size):
                        pulls[i] += changes[i] * weight


@compiled
def _nearest_rank(x: Any, midpoints: Array) -> Any:
    rank, step = np.int64(0), midpoints.size // 2
    while step:
        rank += step * np.int64(x > midpoints[rank + step - 1])
        step //= 2
    return rank


@compiled
def _settle_in_turn(
    goal: Array,
    start: Array,
    scales: Array,
    rows: Array,
    begin: int,
    midpoints: Array,
    half: Any,
    rising: Array,
    by_code: Array,
    by_rank: Array,
    codes: Array,
    errors: Array,
    changes: Array,
    is_first: bool,
    dropped: int,
) -> None:
    """A column's rows from `begin` on, one after the other, each with what the `changes` of those before come to."""
    pair = np.empty(2, np.float32)
    bits = pair.view(np.uint32)
    for i in range(begin, goal.size):
        wanted = start[i] + changes[i]
        x = wanted * factor_of(scales[i], _ONE, _FLOOR)
        rank = np.int64(uniform_level(x, half) + half) if half > 0 else _nearest_rank(x, midpoints)
        pair[0] = rising[rank] * scales[i]
        pair[1] = by_code[codes[i]] * scales[i]
        if dropped:
            _round_bits(bits, pair, 2, dropped)
        if is_first or abs(wanted - pair[0]) < abs(wanted - pair[1]):
            codes[i] = by_rank[rank]
            pair[1] = pair[0]
        error = goal[i] - pair[1]
        change = error - errors[i]
        errors[i] = error
        if change != 0:
            weights = rows[i]
            for k in range(changes.size):
                changes[k] += change * weights[k]


@compiled
def _settle_at_once(
    goal: Array,
    start: Array,
    scales: Array,
    rows: Array,
    midpoints: Array,
    half: Any,
    rising: Array,
    by_code: Array,
    by_rank: Array,
    codes: Array,
    errors: Array,
    changes: Array,
    dropped: int,
    scratch: tuple[Array, Array, Array, Array, Array],
) -> int:
    """A column's rows, in descent: all that come before the next change, at once. Returns how many were settled.

    Hardly any changes; where many do, the rest is left.
    """
    ranks, wanted, values, old, moves = scratch
    bits, old_bits = values.view(np.uint32), old.view(np.uint32)
    _loaded(by_code, codes, scales, dropped, old_bits, old)
    begin = 0
    for _ in range(_FEW_CHANGES):
        scale, code, error = scales[begin:], codes[begin:], errors[begin:]
        _ranks(start[begin:], changes[begin:], scale, midpoints, half, wanted, ranks)
        _loaded(rising, ranks, scale, dropped, bits, values)
        moved, before = False, old[begin:]
        for i in range(scale.size):
            is_better = abs(wanted[i] - values[i]) < abs(wanted[i] - before[i])
            values[i] = values[i] if is_better else before[i]
            ranks[i] = ranks[i] if is_better else np.int32(-1)
            moves[i] = (goal[begin + i] - values[i]) - error[i]
            moved |= moves[i] != 0
        count = scale.size
        if moved:
            count = 1
            while moves[count - 1] == 0:
                count += 1
        for i in range(count):
            if ranks[i] >= 0:
                code[i] = by_rank[ranks[i]]
            error[i] = goal[begin + i] - values[i]
        begin += count
        if not moved:
            return begin
        change, weights = moves[count - 1], rows[begin - 1]
        for k in range(changes.size):
            changes[k] += change * weights[k]
        if begin == goal.size:
            return begin
    return begin


@compiled
def quantize_columns_in_turn(
    target: Array,
    pull: Array,
    coupling: Array,
    scales: Array,
    rows: Array,
    midpoints: Array,
    half: Any,
    rising: Array,
    by_code: Array,
    by_rank: Array,
    codes: Array,
    errors: Array,
    is_first: bool,
    dropped: int,
) -> None:
    """One row after the other, each with the changes of those before."""
    count = target.shape[1]
    changes, start = np.empty(count, np.float32), np.empty(count, np.float32)
    floats = np.empty((4, count), np.float32)
    scratch = (np.empty(count, np.int32), floats[0], floats[1], floats[2], floats[3])
    for j in range(target.shape[0]):
        goal, scale, code, error = target[j], scales[j], codes[j], errors[j]
        for i in range(count):
            changes[i], start[i] = _ZERO, goal[i] + pull[j, i]
        table, begin = (midpoints, half, rising, by_code, by_rank), 0
        if not is_first:
            begin = _settle_at_once(goal, start, scale, rows, *table, code, error, changes, dropped, scratch)
        _settle_in_turn(goal, start, scale, rows, begin, *table, code, error, changes, is_first, dropped)
        moved = False
        for i in range(count):
            moved |= changes[i] != 0
        if moved:
            for k in range(j + 1, target.shape[0]):
                weight, pulls = coupling[j, k], pull[k]
                for i in range(count):
                    pulls[i] += changes[i] * weight


@compiled
def add_product(sparse: Array, matrix: Array, out: Array) -> None:
    for j in range(sparse.shape[0]):
        sums = out[j]
        for i in range(sparse.shape[1]):
            factor, row = sparse[j, i], matrix[i]
            if factor != 0:
                for k in range(sums.size):
                    sums[k] += factor * row[k]
