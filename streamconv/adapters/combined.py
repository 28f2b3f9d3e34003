"""Several adapters on one weight, combined by a rule: products on their factors, as PEFT does it, others on the whole
of what they change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, Product, State, WholeWeight
from streamconv.adapters.combinations import COMBINATIONS, Draw
from streamconv.adapters.shares import OfShares, Share, change_of
from streamconv.checkpoint.types import Shape

_DOUBLE = 8
# Tensors as large as a piece of the sum that a rule holds while it joins: see Combination.join.
_PIECE_BYTES = 2**22 * 4 * 8


@dataclass(frozen=True, slots=True)
class Rule:
    """Combination by its name, with the share of values that it keeps and the seed of those it draws."""

    name: str
    density: float
    seed: int

    def join(
        self, tensors: Sequence[Tensor], shares: Sequence[Share], weights: Sequence[float], what: str
    ) -> Tensor:
        """The combined tensor; `tensors` are used up, and `what` tells theirs from others of the adapters."""
        draws = [Draw(self.seed, f"{share.name} {what}") for share in shares]
        return COMBINATIONS[self.name].join(tensors, weights, self.density, draws)


@dataclass(frozen=True, slots=True)
class FactorsUpdate(OfShares, ByRows):
    """One product whose factors are those of several, combined; `products` has those of the shares, one each."""

    parameter: str
    shares: tuple[Share, ...]
    products: tuple[Product, ...]
    rule: Rule

    @property
    def held_bytes(self) -> int:
        """Copies of the factors, and what is needed to join them; or what a decomposition of their product takes."""
        sizes = [math.prod(part.shape) for part in self.parts.values()]
        if not COMBINATIONS[self.rule.name].cuts:
            return 4 * sum(sizes) + min(_PIECE_BYTES, 8 * 4 * max(sizes))
        ranks = sum(rank_of(share) or 0 for share in self.shares)
        return _DOUBLE * (4 * sum(sizes) + 8 * ranks**2)

    @property
    def low_rank(self) -> int:
        return max(rank_of(share) or 0 for share in self.shares)

    def input_directions(self, parts: Parts) -> Tensor | None:
        return self.products[0].alone.input_directions(self._combined(parts))

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The combined factors, by the roles of the first."""
        del device
        return self._combined(parts)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        return self.products[0].alone.apply(cell, rows, prepared, state)

    def _combined(self, parts: Parts) -> Parts:
        each = list(enumerate(self.products))
        left = [parts[f"{number}.0.{product.left}"] for number, product in each]
        right = [parts[f"{number}.0.{product.right}"] for number, product in each]
        pairs = zip(self.shares, self.products, strict=True)
        scales = [share.weight * product.scaling for share, product in pairs]
        if COMBINATIONS[self.rule.name].cuts:
            found = _cut(left, right, scales, self.low_rank)
        else:
            roots = [math.sqrt(abs(scale)) for scale in scales]
            signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
            found = (self._joined(left, roots, "left"), self._joined(right, signed, "right"))
        return dict(zip((self.products[0].left, self.products[0].right), found, strict=True))

    def _joined(self, factors: Sequence[Tensor], weights: Sequence[float], side: str) -> Tensor:
        copies = [factor.clone() for factor in factors]
        return self.rule.join(copies, self.shares, weights, f"{self.parameter} {side}")


def _cut(
    left: Sequence[Tensor], right: Sequence[Tensor], scales: Sequence[float], rank: int
) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of Σ s B A by that rank (Eckart and Young 1936), in float64.

    With B = Q R and Aᵀ = P S it is that of the small R Sᵀ between Q and Pᵀ.
    """
    scaled = [each.flatten(1).double() * scale for each, scale in zip(left, scales, strict=True)]
    q, r = torch.linalg.qr(torch.cat(scaled, dim=1))
    p, s = torch.linalg.qr(torch.cat([each.flatten(1).double() for each in right]).T)
    u, singular, vh = torch.linalg.svd(r @ s.T, full_matrices=False)
    rank = min(rank, singular.numel())
    found = (q @ (u[:, :rank] * singular[:rank]), vh[:rank] @ p.T)
    outputs, kernel = left[0].shape[0], left[0].shape[2:]
    return (
        found[0].float().reshape(outputs, rank, *kernel),
        found[1].float().reshape(rank, *right[0].shape[1:]),
    )


@dataclass(frozen=True, slots=True)
class DeltasUpdate(OfShares, WholeWeight):
    """Weight plus what several adapters change of it, each by itself, combined."""

    parameter: str
    shape: Shape
    shares: tuple[Share, ...]
    rule: Rule

    @property
    def held_bytes(self) -> int:
        """The weight, what each share changes of it, and what is needed to make and join these, or to cut their sum."""
        size = 4 * math.prod(self.shape)
        if COMBINATIONS[self.rule.name].cuts:
            return 6 * size + 4 * 6 * min(self.shape[0], math.prod(self.shape[1:])) ** 2 + self.members_bytes
        return (1 + len(self.shares)) * size + self.members_bytes + _PIECE_BYTES

    @property
    def solver_bytes(self) -> int:
        """Those of cuSOLVER's gesvdj where the sum is cut, twice the matrix."""
        return 8 * math.prod(self.shape) if COMBINATIONS[self.rule.name].cuts else 0

    @property
    def low_rank(self) -> int | None:
        """The greatest rank of a share, where all are known."""
        ranks = [rank_of(share) for share in self.shares]
        known = [rank for rank in ranks if rank is not None]
        return max(known) if len(known) == len(ranks) else None

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        changes = (change_of(share, number, whole, prepared) for number, share in enumerate(self.shares))
        weights = [share.weight for share in self.shares]
        if not COMBINATIONS[self.rule.name].cuts:
            return whole.add_(self.rule.join(list(changes), self.shares, weights, self.parameter))
        total = torch.zeros_like(whole)
        for change, weight in zip(changes, weights, strict=True):
            total.add_(change, alpha=weight)
        rank = self.low_rank
        assert rank is not None, f"{self.parameter}: a sum is cut to a rank that is known"
        u, s, vh = torch.linalg.svd(total.view(self.shape[0], -1), full_matrices=False)
        return whole.add_(((u[:, :rank] * s[:rank]) @ vh[:rank]).view_as(whole))


def rank_of(share: Share) -> int | None:
    """Rank of a share's factors; None where one of its updates has none."""
    ranks = [update.low_rank for update in share.updates]
    known = [rank for rank in ranks if rank is not None]
    return max(known) if len(known) == len(ranks) else None


def factors_update(shares: Sequence[Share], rule: Rule) -> FactorsUpdate | None:
    """The update by combined factors; None where the shares' factors cannot be combined as the rule has it."""
    products = [share.updates[0].product for share in shares if len(share.updates) == 1]
    found = [product for product in products if product is not None]
    if len(found) < len(shares) or any(one.alone != other.alone for one, other in pairwise(found)):
        return None
    pairs = [(share.updates[0].parts, product) for share, product in zip(shares, found, strict=True)]
    shapes = {(parts[product.left].shape, parts[product.right].shape) for parts, product in pairs}
    if not COMBINATIONS[rule.name].cuts and len(shapes) > 1:
        return None
    return FactorsUpdate(shares[0].updates[0].parameter, tuple(shares), tuple(found), rule)
