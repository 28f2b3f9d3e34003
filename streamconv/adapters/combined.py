"""Several adapters on one weight, combined by a rule: of LoRA on its factors, as PEFT does it, of others on the whole
of what they change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, WholeWeight
from streamconv.adapters.combinations import COMBINATIONS, Draw
from streamconv.adapters.conv import ConvUpdate
from streamconv.adapters.lora import LoraUpdate
from streamconv.adapters.shares import OfShares, Share, change_of
from streamconv.checkpoint.types import Shape

_FACTORS = ("lora_A", "lora_B")
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
    """LoRA whose factors are those of several, combined; `like` is one of the updates, with a scaling of 1.

    Every share is one update of the same kind by `lora_A` and `lora_B`.
    """

    parameter: str
    shares: tuple[Share, ...]
    rule: Rule
    like: LoraUpdate | ConvUpdate

    @property
    def held_bytes(self) -> int:
        """Copies of the factors, and of two more of them; or what a decomposition of their product takes."""
        sizes = [math.prod(part.shape) for part in self.parts.values()]
        if not COMBINATIONS[self.rule.name].cuts:
            return 4 * sum(sizes) + min(_PIECE_BYTES, 8 * 4 * max(sizes))
        ranks = sum(share.updates[0].parts["lora_A"].shape[0] for share in self.shares)
        return _DOUBLE * (4 * sum(sizes) + 8 * ranks**2)

    @property
    def low_rank(self) -> int:
        return max(share.updates[0].parts["lora_A"].shape[0] for share in self.shares)

    def input_directions(self, parts: Parts) -> Tensor | None:
        return self.like.input_directions(self._combined(parts))

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The combined factors, by their roles."""
        del device
        return self._combined(parts)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        return self.like.apply(cell, rows, prepared, state)

    def _combined(self, parts: Parts) -> Parts:
        scales = [share.weight * plain.scaling for share in self.shares if (plain := plain_lora(share))]
        if COMBINATIONS[self.rule.name].cuts:
            return _cut(self._of(parts, "lora_A"), self._of(parts, "lora_B"), scales, self.low_rank)
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        return {
            role: self.rule.join(
                [each.clone() for each in self._of(parts, role)],
                self.shares,
                weights,
                f"{self.parameter} {role}",
            )
            for role, weights in zip(_FACTORS, (signed, roots), strict=True)
        }

    def _of(self, parts: Parts, role: str) -> list[Tensor]:
        return [parts[f"{number}.0.{role}"] for number in range(len(self.shares))]


def _cut(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], rank: int) -> Parts:
    """Factors of the best approximation of Σ s B A by that rank (Eckart and Young 1936), in float64.

    With B = Q R and Aᵀ = P S it is that of the small R Sᵀ between Q and Pᵀ.
    """
    scaled = [each.flatten(1).double() * scale for each, scale in zip(b, scales, strict=True)]
    q, r = torch.linalg.qr(torch.cat(scaled, dim=1))
    p, s = torch.linalg.qr(torch.cat([each.flatten(1).double() for each in a]).T)
    left, singular, right = torch.linalg.svd(r @ s.T, full_matrices=False)
    rank = min(rank, singular.numel())
    found_a, found_b = right[:rank] @ p.T, q @ (left[:, :rank] * singular[:rank])
    return {
        "lora_A": found_a.float().reshape(rank, *a[0].shape[1:]),
        "lora_B": found_b.float().reshape(b[0].shape[0], rank, *b[0].shape[2:]),
    }


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


def plain_lora(share: Share) -> LoraUpdate | ConvUpdate | None:
    """The update of a share that is B A and nothing else; None where it is more."""
    update: Update = share.updates[0]
    if len(share.updates) > 1 or not isinstance(update, LoraUpdate | ConvUpdate):
        return None
    return update if update.parts.keys() == set(_FACTORS) else None


def factors_update(shares: Sequence[Share], rule: Rule) -> FactorsUpdate | None:
    """The update by combined factors; None where the shares' factors cannot be combined as the rule has it."""
    found = [update for share in shares if (update := plain_lora(share)) is not None]
    if len(found) < len(shares):
        return None
    alike = [replace(update, parts=found[0].parts, scaling=1.0) for update in found]
    if any(one != other for one, other in pairwise(alike)):
        return None
    shapes = {tuple(update.parts[role].shape for role in _FACTORS) for update in found}
    if len(shapes) > 1 and not COMBINATIONS[rule.name].cuts:
        return None
    return FactorsUpdate(found[0].parameter, tuple(shares), rule, alike[0])
