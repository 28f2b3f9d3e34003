"""LoRA and DoRA of convolutions: W [out, in, *kernel] + s·Σ B[o, r] A[r, i, *kernel], groups = 1
(`_ConvNd` in `peft/tuners/lora/layer.py`, `_DoraConvNdLayer` in `dora.py`).

Kernels are flattened: an output's weights are one row of [out, in·kernel]. A cell is a run of elements, which begins
and ends anywhere in such rows, as stored rows are those of the kernel's last axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.adapters.base import Parts, Product, State, Update, UpdateAccess
from streamconv.adapters.lora import NO_PARTS, OfFactors, dora_gain
from streamconv.checkpoint.types import Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class _Run:
    """Part of one output's weights: elements `weights` of the output, elements `cell` of the cell."""

    output: int
    weights: slice
    cell: slice


@dataclass(frozen=True, slots=True)
class ConvUpdate(OfFactors):
    """Parts `lora_A` [r, in, *kernel], `lora_B` [out, r, 1, ...], and for DoRA `magnitude`, out numbers."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    is_dora: bool

    @property
    def access(self) -> UpdateAccess:
        """An output may lie in several cells, and its norm needs all of them."""
        return UpdateAccess.REDUCE_THEN_ROW if self.is_dora else UpdateAccess.ROW

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        """Sum of squares of each output's weights so far, float64 [out]."""
        updated = self._add(cell.clone(), rows, prepared)
        zeros = torch.zeros(self.shape[0], dtype=torch.float64, device=cell.device)
        squares = state[0].clone() if state else zeros
        for run in self._runs(rows):
            squares[run.output] += updated[run.cell].double().square().sum()
        return (squares,)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its share of the update, for DoRA scaled to the trained norms; in place."""
        updated = self._add(cell, rows, prepared)
        if self.is_dora:
            (squares,) = state
            magnitude = prepared["magnitude"].double().flatten()
            gain = dora_gain(self.parameter, magnitude, squares.sqrt(), 0)
            for run in self._runs(rows):
                updated[run.cell] *= gain[run.output]
        return cell

    @property
    def product(self) -> Product | None:
        if self.is_dora:
            return None
        return Product("lora_B", "lora_A", self.scaling, replace(self, parts=NO_PARTS, scaling=1.0))

    def weighed(self, weight: float) -> Update | None:
        return None if self.is_dora else replace(self, scaling=weight * self.scaling)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return not self.is_dora and OfFactors.is_neutral(self, constants)

    def _add(self, cell: Tensor, rows: range, prepared: Parts) -> Tensor:
        """The elements of `cell`, flat, after s·B A was added to them in place."""
        a, b = prepared["lora_A"].flatten(1), prepared["lora_B"].flatten(1)
        flat = cell.view(-1)
        for run in self._runs(rows):
            flat[run.cell].addmv_(a[:, run.weights].T, b[run.output], alpha=self.scaling)
        return flat

    def _runs(self, rows: range) -> Iterator[_Run]:
        columns, size = self.shape[-1], math.prod(self.shape[1:])
        origin, stop = rows.start * columns, rows.stop * columns
        start = origin
        while start < stop:
            output, first = divmod(start, size)
            count = min(size - first, stop - start)
            place = start - origin
            yield _Run(output, slice(first, first + count), slice(place, place + count))
            start += count
