"""LoRA of fused experts (`target_parameters`, `ParamWrapper` in `peft/tuners/lora/layer.py`).

Of a parameter P [E, d1, d2], expert e gets, with A[e] the rows e·r to (e+1)·r of lora_A and B[e] the columns of lora_B
[·, E·r] that belong to e,

    axis last:    P[e] + s·B[e] A[e]        A [E·r, d2], B [d1, E·r]
    axis middle:  P[e] + s·(B[e] A[e])ᵀ     A [E·r, d1], B [d2, E·r]

PEFT reads the columns of lora_B rank-major, ρ·E + e; Unsloth trained them expert-major, e·r + ρ, before unsloth-zoo
1269. A checkpoint may store every expert apart, and a fused gate and up projection as two weights: each of those is
rows `offset` and following of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from streamconv.adapters.base import Parts, State
from streamconv.adapters.lora import OfFactors
from streamconv.checkpoint.types import Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class ExpertsUpdate(OfFactors):
    """Parts `lora_A`, the rows of experts from `first` on, and `lora_B`, the columns of all `experts`.

    The weight holds `height` rows of each expert from `first` on, the rows from `offset` on.
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    experts: int
    first: int
    height: int
    offset: int
    transposed: bool
    expert_major: bool

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, one expert after the other, in place."""
        for expert, of_expert, of_cell in self._runs(rows):
            a, b = self._factors(prepared, expert)
            left, right = (a[:, of_expert].T, b.T) if self.transposed else (b[of_expert], a)
            cell[of_cell].addmm_(left, right, alpha=self.scaling)
        return cell

    def _factors(self, prepared: Parts, expert: int) -> tuple[Tensor, Tensor]:
        """A [r, ·] and B [·, r] of one expert: views."""
        b = prepared["lora_B"]
        rank = b.shape[1] // self.experts
        place = (expert - self.first) * rank
        columns = (
            slice(expert * rank, (expert + 1) * rank)
            if self.expert_major
            else slice(expert, None, self.experts)
        )
        return prepared["lora_A"][place : place + rank], b[:, columns]

    def _runs(self, rows: range) -> Iterator[tuple[int, slice, slice]]:
        """Expert, its rows, and those of the cell, for every expert that has rows among `rows`."""
        start = rows.start
        while start < rows.stop:
            number, row = divmod(start, self.height)
            count = min(self.height - row, rows.stop - start)
            place, row = start - rows.start, row + self.offset
            yield self.first + number, slice(row, row + count), slice(place, place + count)
            start += count
