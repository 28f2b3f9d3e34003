"""Loops over blocks of E2M1 codes, in units of 8, compiled for the lengths that blocks have.

With a length that is known, LLVM makes vector instructions of so short a loop. As floats of one bit of mantissa the
values are multiples of 0.5 up to 2, of 1 up to 4, and of 2 up to 6: what is nearest, or next towards 0, is found by a
division that is exact. `values` and the like are [blocks, block]; codes equal the torch kernels' bit for bit.

Loops call each other by names of this module. With a loop among the variables that it is closed over, numba would take
one for another in every process, and compile and keep it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.grids import SMALLEST_DIVISOR
from streamconv.kernels.loops import factor_of
from streamconv.kernels.machine_code import compiled

Array = NDArray[Any]
Loop = Callable[..., None]

_ZERO, _ONE, _GREATEST = np.float32(0), np.float32(1), np.float32(0.75)
# Where steps double, and their reciprocals below, between and above these.
_TWO, _FOUR = np.float32(0.25), np.float32(0.5)
_SMALL, _MIDDLE, _LARGE = np.float32(16), np.float32(8), np.float32(4)
_SIXTEENTH, _EIGHTH, _QUARTER = np.float32(1 / 16), np.float32(1 / 8), np.float32(1 / 4)
_SIGN = np.int32(8)
_FLOOR = np.float32(SMALLEST_DIVISOR)
# Elements that are worked on together.
_STRETCH = 64


@dataclass(frozen=True, slots=True)
class BlockLoops:
    """Loops over blocks of one length."""

    nearest: Loop
    stochastic: Loop
    search: Loop
    kept: Loop


@compiled
def _steps_a_unit(size: Any) -> Any:
    """Reciprocal of the step at a magnitude of at most 0.75."""
    middle = _MIDDLE if size < _FOUR else _LARGE
    return _SMALL if size < _TWO else middle


@compiled
def _first_code(steps: Any) -> Any:
    """The code that a magnitude of 0 would have if all steps were as there."""
    middle = np.int32(2) if steps == _MIDDLE else np.int32(4)
    return np.int32(0) if steps == _SMALL else middle


@compiled
def _signed(code: Any, is_negative: bool) -> Any:
    return code | _SIGN if is_negative and code > np.int32(0) else code


@compiled
def _nearest(x: Any) -> Any:
    """Code of the value nearest to `x`; a tie goes to even, and NaN counts as the least number."""
    size = abs(x)
    size = size if size < _GREATEST else _GREATEST
    steps = _steps_a_unit(size)
    return _signed(np.int32(np.rint(size * steps)) + _first_code(steps), not x >= _ZERO)


@compiled
def _level(x: Any) -> Any:
    """Value nearest to `x`."""
    size = abs(x)
    size = size if size < _GREATEST else _GREATEST
    middle = np.float32(np.rint(size * _MIDDLE)) * _EIGHTH
    large = np.float32(np.rint(size * _LARGE)) * _QUARTER
    level = middle if size < _FOUR else large
    level = np.float32(np.rint(size * _SMALL)) * _SIXTEENTH if size < _TWO else level
    return level if x >= _ZERO else -level


@compiled
def _drawn(x: Any, noise: Any) -> Any:
    """Code of `x`, from -0.75 to 0.75, rounded up or down as `noise` has it."""
    size = abs(x)
    steps = _steps_a_unit(size)
    count = np.floor(size * steps)
    inner = np.float32(count / steps)
    is_between = size > inner
    gap = np.float32(_ONE / steps) if is_between else _ZERO
    is_negative = x < _ZERO
    bottom = -np.float32(inner + gap) if is_negative else inner
    goes_up = np.float32(gap * noise) < np.float32(x - bottom)
    is_farther = is_between and goes_up != is_negative
    return _signed(np.int32(count) + _first_code(steps) + np.int32(is_farther), is_negative)


def _nearest_loop(block: int) -> Loop:
    blocks = _STRETCH // block

    def nearest_e2m1(values: Array, scales: Array, codes: Array) -> None:
        x, wide = np.zeros(_STRETCH, np.float32), np.empty(_STRETCH, np.int32)
        for first in range(0, values.shape[0], blocks):
            count = min(blocks, values.shape[0] - first)
            for k in range(count):
                factor = factor_of(scales[first + k], _ONE, _FLOOR)
                for j in range(block):
                    x[k * block + j] = values[first + k, j] * factor
            for j in range(_STRETCH):
                wide[j] = _nearest(x[j])
            for k in range(count):
                for j in range(block):
                    codes[first + k, j] = np.uint8(wide[k * block + j])

    return compiled(nearest_e2m1)


def _stochastic_loop(block: int) -> Loop:
    blocks = _STRETCH // block

    def stochastic_e2m1(
        values: Array,
        scales: Array,
        start: Array,
        base: Array,
        has_start: bool,
        noise: Array,
        by_code: Array,
        codes: Array,
    ) -> None:
        x, drawn, wide = (
            np.zeros(_STRETCH, np.float32),
            np.zeros(_STRETCH, np.float32),
            np.empty(_STRETCH, np.int32),
        )
        for first in range(0, values.shape[0], blocks):
            count = min(blocks, values.shape[0] - first)
            for k in range(count):
                b, at = first + k, k * block
                factor = factor_of(scales[b], _ONE, _FLOOR)
                if has_start:
                    for j in range(block):
                        x[at + j] = by_code[start[b, j]]
                    for j in range(block):
                        x[at + j] = np.float32(np.float32(values[b, j] - base[b, j]) * factor) + x[at + j]
                else:
                    for j in range(block):
                        x[at + j] = values[b, j] * factor
                for j in range(block):
                    drawn[at + j] = noise[b, j]
            for j in range(_STRETCH):
                inside = x[j] if x[j] > -_GREATEST else -_GREATEST
                inside = inside if inside < _GREATEST else _GREATEST
                wide[j] = _drawn(inside, drawn[j])
            for k in range(count):
                b, at = first + k, k * block
                for j in range(block):
                    stays = has_start and wide[at + j] == np.int32(0) and np.int32(start[b, j]) == _SIGN  # -0
                    codes[b, j] = np.uint8(_SIGN if stays else wide[at + j])

    return compiled(stochastic_e2m1)


@compiled
def _sum_of_16(terms: Array) -> Any:
    """Sum in the order of `pairwise_sum`; terms are used up."""
    for j in range(8):
        terms[j] += terms[j + 8]
    for j in range(4):
        terms[j] += terms[j + 4]
    return (terms[0] + terms[2]) + (terms[1] + terms[3])


@compiled
def _sum_of_32(terms: Array) -> Any:
    for j in range(16):
        terms[j] += terms[j + 16]
    return _sum_of_16(terms)


def _losses_loop(block: int) -> Loop:
    blocks = _STRETCH // block

    def losses(x: Array, scales: Array, wide: Array, terms: Array, found: Array) -> None:
        """Squared error of every block of a stretch, rounded to the nearest with `scales`."""
        for k in range(blocks):
            factor = factor_of(scales[k], _ONE, _FLOOR)
            for j in range(block):
                terms[k * block + j] = factor
                wide[k * block + j] = scales[k]
        for j in range(_STRETCH):
            error = x[j] - np.float32(_level(np.float32(x[j] * terms[j])) * wide[j])
            terms[j] = error * error
        for k in range(blocks):
            place = terms[k * block : (k + 1) * block]
            found[k] = _sum_of_32(place) if block == 32 else _sum_of_16(place)

    return compiled(losses)


def _fits_loop(block: int) -> Loop:
    blocks = _STRETCH // block

    def fits(x: Array, scales: Array, wide: Array, terms: Array, found: Array) -> None:
        """Scale of every block that is best for the values nearest with `scales`."""
        for k in range(blocks):
            factor = factor_of(scales[k], _ONE, _FLOOR)
            for j in range(block):
                terms[k * block + j] = factor
        for j in range(_STRETCH):
            level = _level(np.float32(x[j] * terms[j]))
            terms[j] = x[j] * level
            wide[j] = level * level
        for k in range(blocks):
            own, squares = terms[k * block : (k + 1) * block], wide[k * block : (k + 1) * block]
            if block == 32:
                found[k] = np.float32(_sum_of_32(own) / _sum_of_32(squares))
            else:
                found[k] = np.float32(_sum_of_16(own) / _sum_of_16(squares))

    return compiled(fits)


_losses_16, _losses_32 = _losses_loop(16), _losses_loop(32)
_fits_16, _fits_32 = _fits_loop(16), _fits_loop(32)


def _search_loop(block: int) -> Loop:
    blocks = _STRETCH // block

    def search_e2m1(values: Array, factors: Array, steps: int, scales: Array) -> None:
        """The first of `factors` is 1."""
        x, wide, terms = (
            np.zeros(_STRETCH, np.float32),
            np.empty(_STRETCH, np.float32),
            np.empty(_STRETCH, np.float32),
        )
        start, trial, best, least, loss = np.zeros((5, blocks), np.float32)
        for first in range(0, values.shape[0], blocks):
            count = min(blocks, values.shape[0] - first)
            for k in range(count):
                x[k * block : (k + 1) * block] = values[first + k]
                start[k] = best[k] = scales[first + k]
            least[:] = np.float32(np.inf)
            for number in range(factors.size + steps):
                if number < factors.size:
                    trial[:] = start * factors[number]
                elif block == 32:
                    _fits_32(x, best, wide, terms, trial)
                else:
                    _fits_16(x, best, wide, terms, trial)
                if block == 32:
                    _losses_32(x, trial, wide, terms, loss)
                else:
                    _losses_16(x, trial, wide, terms, loss)
                for k in range(blocks):
                    is_better = loss[k] < least[k]
                    best[k] = trial[k] if is_better else best[k]
                    least[k] = loss[k] if is_better else least[k]
            for k in range(count):
                scales[first + k] = best[k]

    return compiled(search_e2m1)


def _kept_loop(block: int) -> Loop:
    def kept_e2m1(
        codes: Array, by_code: Array, target: Array, base: Array, anchor: Array, inner: Array, sums: Array
    ) -> None:
        terms = np.empty((3, block), np.float32)
        for b in range(codes.shape[0]):
            for j in range(block):
                terms[0, j] = by_code[codes[b, j]]
            for j in range(block):
                delta = target[b, j] - base[b, j]
                terms[0, j] *= delta
                terms[1, j] = anchor[b, j] * delta
                terms[2, j] = delta * delta
            if block == 32:
                inner[b] = _sum_of_32(terms[0])
                sums[0, b] = _sum_of_32(terms[1])
                sums[1, b] = _sum_of_32(terms[2])
            else:
                inner[b] = _sum_of_16(terms[0])
                sums[0, b] = _sum_of_16(terms[1])
                sums[1, b] = _sum_of_16(terms[2])

    return compiled(kept_e2m1)


def _loops_of(block: int) -> BlockLoops:
    return BlockLoops(
        _nearest_loop(block),
        _stochastic_loop(block),
        _search_loop(block),
        _kept_loop(block),
    )


LOOPS = {block: _loops_of(block) for block in (16, 32)}
"""By the length of a block."""
