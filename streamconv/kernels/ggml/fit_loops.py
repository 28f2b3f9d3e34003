"""Search for scales, compiled by numba: see `kernels/loops.py` for how loops are written, `fitting.py` for the search.

LANES blocks are searched side by side. All that is known of them lies in one array, a row of LANES numbers for each
thing: the blocks' first elements, their weights, the second ones, their weights, …, then what the names below say. So
every loop is over lanes, and LLVM sees by how much the places differ that it reads and writes; one place that depends
on the element, and it is no vector loop any more, unless the element's two rows are cut out first.

`values` is [blocks, block]. `weights` is too, or [blocks of a row, block] for rows that are weighed alike, or [0, 0]
where all are 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.machine_code import compiled

Array = NDArray[Any]

LANES = 64
LONGEST = 32
_PAIR = 2 * LANES
(
    _FACTOR,  # by which elements less offset are multiplied
    _OFFSET,
    _TOTAL,  # sums over a block's elements, weighed: of 1, codes, their squares, …
    _CODES,
    _SQUARES,
    _RESTS,  # of what rounding to codes left, its product with the code, its square
    _RESTS_CODES,
    _RESTS_SQUARES,
    _LEAST,  # the smallest loss until now, and what had it
    _BEST_SCALE,
    _BEST_OFFSET,
    _LOW,  # range of a block's elements; the extreme one, where there is no offset
    _RANGE,
    _DIVISOR,  # the range, or 1 where it is none
    _SCALE,  # on trial
    _BEST,  # number of the try that had the smallest loss
    _START,  # stored integers about which is searched, and 16-bit floats they are multiplied by
    _START_LOW,
    _UNIT,
    _UNIT_LOW,
) = (2 * LONGEST * LANES + LANES * row for row in range(20))
_ROWS = 2 * LONGEST + 20

_ZERO, _ONE, _TWO, _HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
_INFINITY = np.float32(np.inf)
_SMALLEST = np.float32(2.0**-40)
_HIGHEST_INTEGER = np.float32(63)
_LOWEST_SIGNED, _HIGHEST_SIGNED = np.float32(-128), np.float32(127)


@compiled
def _load(values: Array, weights: Array, first: int, s: Array) -> Any:
    """Copy blocks into lanes; those for which there is no block are copies of the last. Return how many there are."""
    count = min(LANES, values.shape[0] - first)
    is_weighed = weights.shape[0] > 0
    for b in range(LANES):
        s[_TOTAL + b], s[_OFFSET + b], s[_LEAST + b], s[_BEST + b] = _ZERO, _ZERO, _INFINITY, _ZERO
        at = first + min(b, count - 1)
        row = at % weights.shape[0] if is_weighed else 0
        for j in range(values.shape[1]):
            weight = weights[row, j] if is_weighed else _ONE
            s[_PAIR * j + b], s[_PAIR * j + LANES + b] = values[at, j], weight
            s[_TOTAL + b] += weight
    return count


@compiled
def _moments(s: Array, block: int, lowest: Any, highest: Any) -> None:
    for b in range(LANES):
        s[_CODES + b], s[_SQUARES + b] = _ZERO, _ZERO
        s[_RESTS + b], s[_RESTS_CODES + b], s[_RESTS_SQUARES + b] = _ZERO, _ZERO, _ZERO
    for j in range(block):
        pair = s[_PAIR * j : _PAIR * (j + 1)]
        for b in range(LANES):
            x = (pair[b] - s[_OFFSET + b]) * s[_FACTOR + b]
            code = np.rint(x)
            code = code if code < highest else highest
            code = code if code > lowest else lowest
            rest, weight = x - code, pair[LANES + b]
            weighed, weighed_rest = weight * code, weight * rest
            s[_CODES + b] += weighed
            s[_SQUARES + b] += weighed * code
            s[_RESTS + b] += weighed_rest
            s[_RESTS_CODES + b] += weighed_rest * code
            s[_RESTS_SQUARES + b] += weighed_rest * rest


@compiled
def _losses(s: Array, block: int, lowest: Any, highest: Any) -> None:
    """Squared rests in units of the squared scale."""
    for b in range(LANES):
        scale = s[_SCALE + b]
        s[_FACTOR + b] = _ONE / scale if scale != _ZERO else _ZERO
        s[_RESTS_SQUARES + b] = _ZERO
    for j in range(block):
        pair = s[_PAIR * j : _PAIR * (j + 1)]
        for b in range(LANES):
            x = (pair[b] - s[_OFFSET + b]) * s[_FACTOR + b]
            code = np.rint(x)
            code = code if code < highest else highest
            code = code if code > lowest else lowest
            rest = x - code
            s[_RESTS_SQUARES + b] += pair[LANES + b] * rest * rest


@compiled
def _fit_affine(s: Array, is_limited: bool, margin: Any) -> None:
    """Least squares for scale and offset, given codes; keep them if none were better."""
    for b in range(LANES):
        factor, start, total = s[_FACTOR + b], s[_OFFSET + b], s[_TOTAL + b]
        codes, squares = s[_CODES + b], s[_SQUARES + b]
        rests, products, errors = s[_RESTS + b], s[_RESTS_CODES + b], s[_RESTS_SQUARES + b]
        determinant = total * squares - codes * codes
        divisor = determinant if determinant > _ZERO else _INFINITY
        slope = (total * products - codes * rests) / divisor
        shift = (rests * squares - codes * products) / divisor
        offset = start + shift / factor
        bound = is_limited and offset > _ZERO
        shift = -start * factor if bound else shift
        slope = (products - shift * codes) / (squares if squares > _ZERO else _INFINITY) if bound else slope
        offset = _ZERO if bound else offset
        loss = errors - _TWO * (shift * rests) - _TWO * (slope * products)
        loss += shift * shift * total + _TWO * (shift * slope) * codes + slope * slope * squares
        loss += margin * total
        loss /= factor * factor
        is_better = (loss < s[_LEAST + b]) & (slope > -_ONE)
        s[_LEAST + b] = loss if is_better else s[_LEAST + b]
        s[_BEST_SCALE + b] = (_ONE + slope) / factor if is_better else s[_BEST_SCALE + b]
        s[_BEST_OFFSET + b] = offset if is_better else s[_BEST_OFFSET + b]


@compiled
def _fit_scale(s: Array) -> None:
    for b in range(LANES):
        factor, squares, products = s[_FACTOR + b], s[_SQUARES + b], s[_RESTS_CODES + b]
        slope = products / (squares if squares > _ZERO else _INFINITY)
        loss = (s[_RESTS_SQUARES + b] - slope * products) / (factor * factor)
        is_better = loss < s[_LEAST + b]
        s[_LEAST + b] = loss if is_better else s[_LEAST + b]
        s[_BEST_SCALE + b] = (_ONE + slope) / factor if is_better else s[_BEST_SCALE + b]


@compiled
def _from_best(s: Array) -> None:
    for b in range(LANES):
        scale = s[_BEST_SCALE + b]
        s[_FACTOR + b] = _ONE / (scale if scale != _ZERO else _ONE)
        s[_OFFSET + b] = s[_BEST_OFFSET + b]


@compiled
def _find_range(s: Array, block: int, is_limited: bool) -> None:
    for b in range(LANES):
        s[_LOW + b], s[_RANGE + b] = s[b], s[b]
        if is_limited:
            s[_LOW + b] = s[b] if s[b] < _ZERO else _ZERO
    for j in range(1, block):
        for b in range(LANES):
            x = s[_PAIR * j + b]
            s[_LOW + b] = x if x < s[_LOW + b] else s[_LOW + b]
            s[_RANGE + b] = x if x > s[_RANGE + b] else s[_RANGE + b]
    for b in range(LANES):
        width = s[_RANGE + b] - s[_LOW + b]
        s[_RANGE + b], s[_DIVISOR + b] = width, width if width > _SMALLEST else _ONE
        s[_BEST_SCALE + b], s[_BEST_OFFSET + b] = _ZERO, s[_LOW + b]


@compiled
def search_affine(
    values: Array,
    weights: Array,
    peaks: Array,
    shares: Array,
    margins: Array,
    refits: int,
    highest: Any,
    is_limited: bool,
    scales: Array,
) -> None:
    """Write scales and offsets, [blocks, 2]. `is_limited`: no offset is above 0.

    `shares`: of a block's range, by which the offset that goes with a peak lies below the least element. `margins`: see
    MARGIN.
    """
    s, block = np.empty(_ROWS * LANES, np.float32), values.shape[1]
    for first in range(0, values.shape[0], LANES):
        count = _load(values, weights, first, s)
        _find_range(s, block, is_limited)
        for number in range(peaks.size + refits):
            margin = _ZERO
            if number < peaks.size:
                margin = margins[number]
                peak, share = peaks[number], shares[number]
                for b in range(LANES):
                    s[_FACTOR + b] = peak / s[_DIVISOR + b]
                    s[_OFFSET + b] = s[_LOW + b] - s[_RANGE + b] * share
            else:
                _from_best(s)
            _moments(s, block, _ZERO, highest)
            _fit_affine(s, is_limited, margin)
        for b in range(count):
            is_flat = s[_RANGE + b] <= _SMALLEST
            scales[first + b, 0] = _ZERO if is_flat else s[_BEST_SCALE + b]
            scales[first + b, 1] = s[_LOW + b] if is_flat else s[_BEST_OFFSET + b]


@compiled
def _find_extreme(s: Array, block: int) -> None:
    for b in range(LANES):
        s[_RANGE + b], s[_BEST_SCALE + b], s[_BEST_OFFSET + b] = s[b], _ZERO, _ZERO
    for j in range(1, block):
        for b in range(LANES):
            x = s[_PAIR * j + b]
            s[_RANGE + b] = x if abs(x) > abs(s[_RANGE + b]) else s[_RANGE + b]
    for b in range(LANES):
        extreme = s[_RANGE + b]
        s[_DIVISOR + b] = extreme if abs(extreme) > _SMALLEST else _ONE


@compiled
def search_symmetric(
    values: Array, weights: Array, peaks: Array, refits: int, lowest: Any, highest: Any, scales: Array
) -> None:
    """Write scales, [blocks]."""
    s, block = np.empty(_ROWS * LANES, np.float32), values.shape[1]
    for first in range(0, values.shape[0], LANES):
        count = _load(values, weights, first, s)
        _find_extreme(s, block)
        for number in range(peaks.size + refits):
            if number < peaks.size:
                peak = peaks[number]
                for b in range(LANES):
                    s[_FACTOR + b] = peak / s[_DIVISOR + b]
            else:
                _from_best(s)
            _moments(s, block, lowest, highest)
            _fit_scale(s)
        for b in range(count):
            is_flat = abs(s[_RANGE + b]) <= _SMALLEST
            scales[first + b] = _ZERO if is_flat else s[_BEST_SCALE + b]


@compiled
def _keep_better(s: Array, number: int) -> None:
    """Remember the number of the try: what was tried, chosen by a comparison, would be no vector loop."""
    place = np.float32(number)
    for b in range(LANES):
        scale = s[_SCALE + b]
        loss = s[_RESTS_SQUARES + b] * (scale * scale)
        loss = loss if scale != _ZERO else _INFINITY
        is_better = loss < s[_LEAST + b]
        s[_LEAST + b] = loss if is_better else s[_LEAST + b]
        s[_BEST + b] = place if is_better else s[_BEST + b]


@compiled
def _within(x: Any, lowest: Any, highest: Any) -> Any:
    x = x if x > lowest else lowest
    return x if x < highest else highest


@compiled
def try_pairs(
    values: Array, weights: Array, units: Array, steps: Array, highest: Any, integers: Array
) -> None:
    """Replace stored integers of scale and offset, float32 [blocks, 2], by the best pair near them.

    `units` [blocks, 2]: their 16-bit floats; `steps`: differences that are tried of each, 0 first.
    """
    s, block = np.empty(_ROWS * LANES, np.float32), values.shape[1]
    for first in range(0, values.shape[0], LANES):
        count = _load(values, weights, first, s)
        for b in range(LANES):
            at = first + min(b, count - 1)
            s[_UNIT + b], s[_UNIT_LOW + b] = units[at, 0], units[at, 1]
            s[_START + b], s[_START_LOW + b] = integers[at, 0], integers[at, 1]
        for number in range(steps.size * steps.size):
            step, low_step = steps[number // steps.size], steps[number % steps.size]
            for b in range(LANES):
                s[_SCALE + b] = s[_UNIT + b] * _within(s[_START + b] + step, _ZERO, _HIGHEST_INTEGER)
                low = _within(s[_START_LOW + b] + low_step, _ZERO, _HIGHEST_INTEGER)
                s[_OFFSET + b] = -(s[_UNIT_LOW + b] * low)
            _losses(s, block, _ZERO, highest)
            _keep_better(s, number)
        for b in range(count):
            number = int(s[_BEST + b])
            step, low_step = steps[number // steps.size], steps[number % steps.size]
            integers[first + b, 0] = _within(s[_START + b] + step, _ZERO, _HIGHEST_INTEGER)
            integers[first + b, 1] = _within(s[_START_LOW + b] + low_step, _ZERO, _HIGHEST_INTEGER)


@compiled
def try_integers(
    values: Array, weights: Array, units: Array, steps: Array, limits: tuple[Any, Any], integers: Array
) -> None:
    """Replace stored integers of scales, float32 [blocks], by the best near them, of either sign."""
    s, block = np.empty(_ROWS * LANES, np.float32), values.shape[1]
    for first in range(0, values.shape[0], LANES):
        count = _load(values, weights, first, s)
        for b in range(LANES):
            at = first + min(b, count - 1)
            s[_UNIT + b], s[_START + b] = units[at], integers[at]
        for number in range(2 * steps.size):
            step, sign = steps[number % steps.size], _ONE if number < steps.size else -_ONE
            for b in range(LANES):
                trial = _within((s[_START + b] + step) * sign, _LOWEST_SIGNED, _HIGHEST_SIGNED)
                s[_SCALE + b] = s[_UNIT + b] * trial
            _losses(s, block, limits[0], limits[1])
            _keep_better(s, number)
        for b in range(count):
            number = int(s[_BEST + b])
            step, sign = steps[number % steps.size], _ONE if number < steps.size else -_ONE
            integers[first + b] = _within((s[_START + b] + step) * sign, _LOWEST_SIGNED, _HIGHEST_SIGNED)


@compiled
def try_scales(values: Array, weights: Array, trials: Array, limits: tuple[Any, Any], scales: Array) -> None:
    """Write the best scale of [tries, blocks] for each block."""
    s, block = np.empty(_ROWS * LANES, np.float32), values.shape[1]
    for first in range(0, values.shape[0], LANES):
        count = _load(values, weights, first, s)
        for number in range(trials.shape[0]):
            for b in range(LANES):
                s[_SCALE + b] = trials[number, first + min(b, count - 1)]
            _losses(s, block, limits[0], limits[1])
            _keep_better(s, number)
        for b in range(count):
            scales[first + b] = trials[int(s[_BEST + b]), first + b]
