"""Search for the scales and offsets of ggml's types that leave the least squared error, weighed or not.

First every block by itself: elements are multiplied so that their range, or the greatest magnitude among them, falls
on one of several numbers near the last code; the codes of each choice give a scale, and an offset, by least squares;
those of the best give them anew. Then the 16-bit float of every super-block is chosen so that none of its blocks is
out of reach, and for each block all integers near the wished ones are tried, as a loader will multiply with them.
Types whose blocks have 16-bit floats of their own, without offset, try those near the wished one.

Here in torch, for any device: what the compiled loops must equal bit for bit. Sums are taken element after element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamconv.kernels.ggml.packing import codes_of
from streamconv.kernels.ggml.scales import Nested, joined, split, to_half
from streamconv.kernels.ggml.types import BlockType, Codes
from streamconv.kernels.grids import divided

# Ranges narrower than this are none: no 16-bit float could tell.
SMALLEST = 2.0**-40
# Squares of a step by which another offset must do better for each element than what puts the least one on a code: of
# two that are as good, blocks that are alike have the same, and integers of a super-block fit both.
MARGIN = 2.0**-9


@dataclass(frozen=True, slots=True)
class Tries:
    """Extent of a search: so many numbers near the last code, `step` apart; the best fitted anew so often; integers as
    far as `reach` from the wished one. `below`: codes by which the least element lies above an offset that is tried.
    """

    peaks: int
    step: float
    refits: int
    reach: int
    below: tuple[float, ...] = ()

    def about(self, peak: float) -> list[float]:
        """Numbers to try, `peak` first, so that weights that lie on a grid stay there."""
        sides = (sign * place * self.step for place in range(1, self.peaks // 2 + 1) for sign in (-1, 1))
        return [peak, *(peak + side for side in sides)]

    @property
    def steps(self) -> list[int]:
        """Differences from a wished integer, 0 first."""
        return [0, *(sign * size for size in range(1, self.reach + 1) for sign in (-1, 1))]


_TRIES = {
    "q4_0": Tries(peaks=21, step=0.1, refits=2, reach=1),
    "q5_0": Tries(peaks=21, step=0.1, refits=2, reach=1),
    "q8_0": Tries(peaks=9, step=0.1, refits=0, reach=5),
    "q6_k": Tries(peaks=9, step=0.2, refits=1, reach=8),
    # Where a few elements are far from the others, these do best between two codes' values, not from one on.
    "q4_1": Tries(peaks=19, step=1 / 9, refits=2, reach=0, below=(0.5, 0.75)),
    "q5_1": Tries(peaks=19, step=1 / 9, refits=2, reach=0, below=(0.5, 0.75)),
    "q4_k": Tries(peaks=19, step=1 / 9, refits=2, reach=3, below=(0.5, 0.75)),
    "q5_k": Tries(peaks=19, step=1 / 9, refits=2, reach=3, below=(0.5, 0.75)),
}


class Searches(Protocol):
    """Loops of the search over blocks: [blocks, block] float32; weights alike, or of one row's blocks, or None."""

    def affine(
        self, values: Tensor, weights: Tensor | None, peaks: list[float], tries: Tries, codes: Codes
    ) -> Tensor:
        """Scales and offsets of blocks by themselves, [blocks, 2]."""

    def symmetric(
        self, values: Tensor, weights: Tensor | None, peaks: list[float], tries: Tries, codes: Codes
    ) -> Tensor:
        """Scales of blocks by themselves, [blocks]."""

    def pairs(
        self, values: Tensor, weights: Tensor | None, units: Tensor, start: Tensor, tries: Tries, codes: Codes
    ) -> Tensor:
        """The best integers near those at the start, [blocks, 2]; `units` are what multiplies them."""

    def integers(
        self, values: Tensor, weights: Tensor | None, units: Tensor, start: Tensor, tries: Tries, codes: Codes
    ) -> Tensor:
        """The best integers near those at the start, of either sign, [blocks]."""

    def scales(self, values: Tensor, weights: Tensor | None, trials: Tensor, codes: Codes) -> Tensor:
        """The best of several scales, [tries, blocks]; the first, if none is better: [blocks]."""


def fit(
    kind: BlockType, values: Tensor, weights: Tensor | None, searches: Searches, nested: Nested
) -> Tensor:
    """Scales for `values` [n, super_block], as a loader will have them: [n * blocks], or [n * blocks, 2]."""
    codes, tries = codes_of(kind), _TRIES[kind.name]
    blocks = values.reshape(-1, kind.block)
    importance = None if weights is None else weights.reshape(-1, kind.block)
    if codes.has_offset:
        found = searches.affine(blocks, importance, tries.about(codes.highest), tries, codes)
        if not codes.is_nested:
            return to_half(found)
        factors, integers = split(kind, found, nested)
        units = factors.repeat_interleave(kind.blocks, dim=0)
        start = integers.reshape(-1, 2).float()
        best = searches.pairs(blocks, importance, units, start, tries, codes)
        return joined(kind, factors, best.reshape(integers.shape))
    found = searches.symmetric(blocks, importance, _extreme_peaks(tries, codes), tries, codes)
    if not codes.is_nested:
        # The plainest scale first, so that weights that lie on a grid stay there.
        near = [divided(_extremes(blocks), codes.peak), *(found * (1 + step / 1024) for step in tries.steps)]
        return searches.scales(blocks, importance, to_half(torch.stack(near)), codes)
    factors, integers = split(kind, found, nested)
    units = factors[:, 0].repeat_interleave(kind.blocks)
    best = searches.integers(blocks, importance, units, integers.reshape(-1).float(), tries, codes)
    return joined(kind, factors, best.reshape(integers.shape))


class Ranges(Protocol):
    """Search for the least and the greatest element of each block."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both, [blocks] each, of [blocks, block]."""


def ranges_in_torch(values: Tensor) -> tuple[Tensor, Tensor]:
    """See Ranges."""
    return values.amin(1), values.amax(1)


def starting_scales(kind: BlockType, values: Tensor, ranges: Ranges) -> Tensor:
    """Scales by the plainest rule, not yet stored: a block's range, or its greatest magnitude, falls on the last code.

    Of two elements of greatest magnitude, the negative one is it.
    """
    codes = codes_of(kind)
    low, high = ranges(values.reshape(-1, kind.block))
    if not codes.has_offset:
        return divided(torch.where(-low >= high, low, high), codes.peak)
    low = low.clamp(max=0) if codes.is_nested else low
    return torch.stack((divided(high - low, codes.highest), low), dim=1)


def _extremes(values: Tensor) -> Tensor:
    """The element of greatest magnitude of each block, the first of several."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]


def _extreme_peaks(tries: Tries, codes: Codes) -> list[float]:
    """Numbers on which the element of greatest magnitude may fall: near either end, if the ends are not alike."""
    if codes.highest == -codes.lowest:
        return tries.about(codes.highest)
    return tries.about(codes.lowest) + tries.about(codes.highest + 0.5)


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over the elements of each block, weighed: of codes, their squares, what rounding to them left (the rests),
    its product with the code, and its square.
    """

    codes: Tensor
    squares: Tensor
    rests: Tensor
    products: Tensor
    errors: Tensor


@dataclass(slots=True)
class _Best:
    """The smallest loss of each block until now, and what had it."""

    loss: Tensor
    scale: Tensor
    offset: Tensor

    def keep_better(self, is_better: Tensor, loss: Tensor, scale: Tensor, offset: Tensor) -> None:
        self.loss = torch.where(is_better, loss, self.loss)
        self.scale = torch.where(is_better, scale, self.scale)
        self.offset = torch.where(is_better, offset, self.offset)


def _best_of_none(scale: Tensor, offset: Tensor) -> _Best:
    return _Best(torch.full_like(scale, torch.inf), scale, offset)


class _Blocks:
    """Elements of all blocks and their weights, [block][blocks] each."""

    def __init__(self, values: Tensor, weights: Tensor | None) -> None:
        self.elements = values.t().contiguous().unbind()
        ones = torch.ones_like(self.elements[0])
        if weights is None:
            self.weights: Sequence[Tensor] = [ones] * len(self.elements)
        else:
            self.weights = weights.t().repeat(1, len(values) // len(weights)).unbind()
        self.total = torch.zeros_like(ones)
        for weight in self.weights:
            self.total = self.total + weight

    def moments(self, factor: Tensor, offset: Tensor, codes: Codes) -> _Moments:
        sums = [torch.zeros_like(factor) for _ in range(5)]
        for element, weight in zip(self.elements, self.weights, strict=True):
            code, rest = _rounded(element, factor, offset, codes)
            weighed, weighed_rest = weight * code, weight * rest
            terms = (weighed, weighed * code, weighed_rest, weighed_rest * code, weighed_rest * rest)
            for place, term in enumerate(terms):
                sums[place] += term
        return _Moments(*sums)

    def losses(self, scale: Tensor, offset: Tensor, codes: Codes) -> Tensor:
        """Squared error of each block with stored scales; infinity with none."""
        factor = torch.where(scale != 0, 1 / scale, 0)
        total = torch.zeros_like(scale)
        for element, weight in zip(self.elements, self.weights, strict=True):
            _, rest = _rounded(element, factor, offset, codes)
            total += weight * rest * rest
        return torch.where(scale != 0, total * (scale * scale), torch.inf)


def _rounded(element: Tensor, factor: Tensor, offset: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    x = (element - offset) * factor
    code = x.round().clamp_(codes.lowest, codes.highest)
    return code, x - code


def _above_zero(numbers: Tensor) -> Tensor:
    """Divisors: infinity in place of what is not above 0."""
    return torch.where(numbers > 0, numbers, torch.inf)


def _fit_affine(
    best: _Best,
    sums: _Moments,
    total: Tensor,
    factor: Tensor,
    start: Tensor,
    is_limited: bool,
    margin: float,
) -> None:
    divisor = _above_zero(total * sums.squares - sums.codes * sums.codes)
    slope = (total * sums.products - sums.codes * sums.rests) / divisor
    shift = (sums.rests * sums.squares - sums.codes * sums.products) / divisor
    offset = start + shift / factor
    if is_limited:
        bound = offset > 0
        shift = torch.where(bound, -start * factor, shift)
        slope = torch.where(bound, (sums.products - shift * sums.codes) / _above_zero(sums.squares), slope)
        offset = torch.where(bound, 0, offset)
    loss = sums.errors - 2 * (shift * sums.rests) - 2 * (slope * sums.products)
    loss += shift * shift * total + 2 * (shift * slope) * sums.codes + slope * slope * sums.squares
    loss += margin * total
    loss /= factor * factor
    best.keep_better((loss < best.loss) & (slope > -1), loss, (1 + slope) / factor, offset)


def _over(peak: float, width: Tensor, is_flat: Tensor) -> Tensor:
    """One division: of a number by a tensor, torch makes two operations."""
    return torch.full_like(width, peak) / torch.where(is_flat, 1, width)


def _inverse(scale: Tensor) -> Tensor:
    return 1 / torch.where(scale != 0, scale, 1)


@dataclass(frozen=True, slots=True)
class TorchSearches:
    """See Searches."""

    def affine(
        self, values: Tensor, weights: Tensor | None, peaks: list[float], tries: Tries, codes: Codes
    ) -> Tensor:
        blocks, is_limited = _Blocks(values, weights), codes.is_nested
        low, high = values.amin(1), values.amax(1)
        low = low.clamp(max=0) if is_limited else low
        width = high - low
        is_flat = width <= SMALLEST
        best = _best_of_none(torch.zeros_like(low), low)
        trials = [(peak, 0.0) for peak in peaks] + [(codes.highest - less, less) for less in tries.below]
        for number in range(len(trials) + tries.refits):
            margin = MARGIN if len(peaks) <= number < len(trials) else 0.0
            if number < len(trials):
                peak, less = trials[number]
                factor, start = _over(peak, width, is_flat), low - width * (less / codes.highest)
            else:
                factor, start = _inverse(best.scale), best.offset
            sums = blocks.moments(factor, start, codes)
            _fit_affine(best, sums, blocks.total, factor, start, is_limited, margin)
        pair = torch.where(is_flat, 0, best.scale), torch.where(is_flat, low, best.offset)
        return torch.stack(pair, dim=1)

    def symmetric(
        self, values: Tensor, weights: Tensor | None, peaks: list[float], tries: Tries, codes: Codes
    ) -> Tensor:
        blocks = _Blocks(values, weights)
        extreme = _extremes(values)
        none = torch.zeros_like(extreme)
        best = _best_of_none(none, none)
        is_flat = extreme.abs() <= SMALLEST
        for number in range(len(peaks) + tries.refits):
            is_trial = number < len(peaks)
            factor = _over(peaks[number], extreme, is_flat) if is_trial else _inverse(best.scale)
            sums = blocks.moments(factor, none, codes)
            slope = sums.products / _above_zero(sums.squares)
            loss = (sums.errors - slope * sums.products) / (factor * factor)
            best.keep_better(loss < best.loss, loss, (1 + slope) / factor, none)
        return torch.where(is_flat, 0, best.scale)

    def pairs(
        self, values: Tensor, weights: Tensor | None, units: Tensor, start: Tensor, tries: Tries, codes: Codes
    ) -> Tensor:
        blocks, best = _Blocks(values, weights), _best_of_none(start[:, 0], start[:, 1])
        for step in tries.steps:
            for low_step in tries.steps:
                trial = (start[:, 0] + step).clamp(0, codes.scale_limit)
                low = (start[:, 1] + low_step).clamp(0, codes.scale_limit)
                loss = blocks.losses(units[:, 0] * trial, -(units[:, 1] * low), codes)
                best.keep_better(loss < best.loss, loss, trial, low)
        return torch.stack((best.scale, best.offset), dim=1)

    def integers(
        self, values: Tensor, weights: Tensor | None, units: Tensor, start: Tensor, tries: Tries, codes: Codes
    ) -> Tensor:
        blocks, none = _Blocks(values, weights), torch.zeros_like(start)
        best = _best_of_none(start, none)
        for sign in (1, -1):
            for step in tries.steps:
                trial = ((start + step) * sign).clamp(-codes.scale_limit, codes.scale_limit - 1)
                loss = blocks.losses(units * trial, none, codes)
                best.keep_better(loss < best.loss, loss, trial, none)
        return best.scale

    def scales(self, values: Tensor, weights: Tensor | None, trials: Tensor, codes: Codes) -> Tensor:
        blocks, none = _Blocks(values, weights), torch.zeros_like(trials[0])
        best = _best_of_none(trials[0], none)
        for trial in trials:
            loss = blocks.losses(trial, none, codes)
            best.keep_better(loss < best.loss, loss, trial, none)
        return best.scale
