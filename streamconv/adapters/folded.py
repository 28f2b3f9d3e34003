"""LoRA whose factors are stored smaller than they act: BD-LoRA and QA-LoRA (Xu et al. 2023, arXiv 2309.14717), as
`BdLoraLinearVariant` and `QALoraLinearVariant` in `peft/tuners/lora/variants.py` have them.

BD-LoRA makes one factor block-diagonal and stores the blocks one below the other, lora_A as [r, in/n] or lora_B as
[out, r/n]; block j of n is rows j·r/n and following of A and columns j·r/n and following of B, so that

    W[O, I] + s·B[O, ρ] A[ρ, I]     for ρ the ranks of block j, and its outputs O or inputs I, all of the others

QA-LoRA sees of g inputs that share a scale their mean, times in/g: lora_A is [r, in/g], and

    W + s·in/g²·B A̅                 with every column of A standing for g equal ones in A̅
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.adapters.base import Parts, State
from streamconv.adapters.lora import OfFactors
from streamconv.checkpoint.types import Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class BlockLoraUpdate(OfFactors):
    """Parts `lora_A` and `lora_B`, of one of which only the `blocks` on the diagonal are there."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    blocks: int

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, one block after the other, in place."""
        for outputs, inputs, b, a in self._blocks(prepared):
            first, last = max(rows.start, outputs.start), min(rows.stop, outputs.stop)
            if first < last:
                place = cell[first - rows.start : last - rows.start, inputs.start : inputs.stop]
                place.addmm_(b[first - outputs.start : last - outputs.start], a, alpha=self.scaling)
        return cell

    def _blocks(self, prepared: Parts) -> Iterator[tuple[range, range, Tensor, Tensor]]:
        """Outputs, inputs, and factors [outputs, r/n] and [r/n, inputs] of every block."""
        a, b = prepared["lora_A"], prepared["lora_B"]
        ranks = a.shape[0] // self.blocks
        folds_b = b.shape[1] < a.shape[0]
        height, width = b.shape[0] // self.blocks, a.shape[1]
        for block in range(self.blocks):
            of_a = a[block * ranks : (block + 1) * ranks]
            if folds_b:
                outputs = range(block * height, (block + 1) * height)
                yield outputs, range(width), b[outputs.start : outputs.stop], of_a
            else:
                inputs = range(block * width, (block + 1) * width)
                yield range(b.shape[0]), inputs, b[:, block * ranks : (block + 1) * ranks], of_a


@dataclass(frozen=True, slots=True)
class PooledLoraUpdate(OfFactors):
    """Parts `lora_A` [r, in/group] and `lora_B` [out, r]; `transposed`: the weight is stored as [in, out]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool
    group: int

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, the same number for all inputs of a group, in place."""
        a, b = prepared["lora_A"], prepared["lora_B"]
        scaling = self.scaling * a.shape[1] / self.group
        if self.transposed:
            groups = torch.arange(rows.start, rows.stop, device=a.device) // self.group
            return torch.addmm(cell, a[:, groups].T, b.T, alpha=scaling, out=cell)
        of_groups = b[rows.start : rows.stop] @ a
        cell.view(-1, a.shape[1], self.group).add_(of_groups.unsqueeze(2), alpha=scaling)
        return cell
