"""Rules by which PEFT's `add_weighted_adapter` combines adapters (`peft/utils/merge_utils.py`), after their papers:

    linear           Σ w t
    magnitude_prune  Σ w p(t)         p keeps the largest magnitudes, a share of all, and makes the rest zero
    dare_linear      Σ w d(t)         d keeps a random share and divides it by that (Yu et al. 2023, arXiv 2311.03099)
    ties             see `_elected`, of p(t) (Yadav et al. 2023, arXiv 2306.01708, algorithm 1)
    dare_ties        the same of d(t)
    cat              the sum of the updates as it is
    svd              that sum, cut to the greatest rank among the adapters

PEFT applies the first five to factors, A and B of LoRA each by itself, with √|w s| on either and the sign on A; the
result is not that of the rule applied to the updates B A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from streamconv.rounding.noise import ROWS_PER_KEY, uniform

_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Draw:
    """Source of a tensor's random numbers: no other tensor, device or order changes them."""

    seed: int
    name: str


Prune = Callable[[Tensor, float, Draw], None]


@dataclass(frozen=True, slots=True)
class Combination:
    """Rule for combining adapters: `prune` makes a part of every tensor zero, in place, `elects` lets tensors agree on
    signs; or updates are just added (`adds`), and cut to the greatest rank among them (`cuts`).
    """

    prune: Prune | None = None
    elects: bool = False
    adds: bool = False
    cuts: bool = False

    @property
    def needs_density(self) -> bool:
        return self.prune is not None

    def join(
        self, tensors: Sequence[Tensor], weights: Sequence[float], density: float, draws: Sequence[Draw]
    ) -> Tensor:
        """The combined tensor, float32; `tensors`, contiguous, are used up."""
        if self.prune is not None:
            for tensor, draw in zip(tensors, draws, strict=True):
                self.prune(tensor, density, draw)
        flat = [tensor.view(-1) for tensor in tensors]
        for first in range(0, flat[0].numel(), _CHUNK):
            pieces = [each[first : first + _CHUNK] for each in flat]
            joined = _elected(pieces, weights) if self.elects else _sum(pieces, weights)
            pieces[0].copy_(joined)
        return tensors[0]


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _elected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of w t over those tensors whose sign is that of Σ t; zero has none, and a sum of zero is positive."""
    total = _sum(tensors, [1.0] * len(tensors))
    sign = torch.where(total >= 0, 1.0, -1.0)
    mixed, count = torch.zeros_like(total), torch.zeros_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == sign
        mixed.add_(tensor * agrees, alpha=weight)
        count.add_(agrees)
    return mixed.div_(count.clamp_(min=1))


def keep_largest(tensor: Tensor, density: float, draw: Draw) -> None:
    """Make all but the largest magnitudes zero, in place; of equal ones, those that come first are kept."""
    del draw
    flat = tensor.view(-1)
    keep = int(density * flat.numel())
    if keep >= flat.numel():
        return
    least, among = _least_kept(flat, keep)
    for piece in _pieces(flat):
        bits = _magnitude_bits(piece)
        equal = bits == least
        piece.mul_((bits > least) | (equal & (equal.cumsum(0) <= among)))
        among -= min(among, int(equal.sum()))


def keep_random(tensor: Tensor, density: float, draw: Draw) -> None:
    """Keep every value with the probability `density`, divided by it, and make the others zero, in place."""
    rows = tensor.view(-1, tensor.shape[-1])
    drawn = torch.empty(
        min(ROWS_PER_KEY, rows.shape[0]) * rows.shape[1], dtype=torch.float32, device=tensor.device
    )
    for first in range(0, rows.shape[0], ROWS_PER_KEY):
        some = rows[first : first + ROWS_PER_KEY]
        numbers = drawn[: some.numel()]
        uniform(draw.seed, draw.name, range(first, first + some.shape[0]), some.shape[1], numbers)
        some.mul_(numbers.view_as(some) < density).div_(density)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    return (flat[first : first + _CHUNK] for first in range(0, flat.numel(), _CHUNK))


def _magnitude_bits(values: Tensor) -> Tensor:
    """Bits of |x|, int32, in whose order magnitudes are."""
    return values.view(torch.int32) & 0x7FFFFFFF


def _least_kept(flat: Tensor, keep: int) -> tuple[int, int]:
    """Bits of the `keep`-th largest magnitude, and how many of those equal to it are among these: by counting the
    upper and then the lower half of the bits, so that no order is ever made.
    """
    upper = torch.zeros(2**15, dtype=torch.int64, device=flat.device)
    for piece in _pieces(flat):
        upper += torch.bincount(_magnitude_bits(piece) >> 16, minlength=2**15)
    high, within = _place(upper, keep)
    lower = torch.zeros(2**16, dtype=torch.int64, device=flat.device)
    for piece in _pieces(flat):
        bits = _magnitude_bits(piece)
        lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=2**16)
    low, among = _place(lower, within)
    return (high << 16) | low, among


def _place(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin that the `keep`-th lies in, counted from the last, and its number there."""
    above = counts.flip(0).cumsum(0)
    number = int((above < keep).sum())
    before = int(above[number - 1]) if number else 0
    return counts.numel() - 1 - number, keep - before


COMBINATIONS: Mapping[str, Combination] = MappingProxyType(
    {
        "linear": Combination(),
        "cat": Combination(adds=True),
        "ties": Combination(keep_largest, elects=True),
        "dare_linear": Combination(keep_random),
        "dare_ties": Combination(keep_random, elects=True),
        "magnitude_prune": Combination(keep_largest),
        "svd": Combination(cuts=True),
    }
)
