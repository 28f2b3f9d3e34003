"""A layer's weight as it is rounded: transposed, in the order of its metric; and solutions, with their loss.

With E = T - Q, H = M_H M_Hᵀ of the inputs and G = M_G M_Gᵀ of the outputs, both M upper triangular, the loss is
tr(G E H Eᵀ) = ||M_Gᵀ E M_H||². Without G rows count alike and do not know of each other: the loss is a sum of theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from streamconv.dtypes import F32, Dtype
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import Grid
from streamconv.kernels.in_torch import dequantized
from streamconv.kernels.offsets import shifts
from streamconv.kernels.ordered import columns_of
from streamconv.rounding.metric import STRETCH, Metric, stretches
from streamconv.threads import Pool

# Columns gone through one by one before a matrix product carries their errors to the others.
PANEL = 64
# Rows worked on at once by a thread of a CPU: enough for fast matrix products, few enough to share out; whole cells.
ROWS = 128
DEVICE_ROWS = 4096
_TRIANGLE = 256

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """`target` is [in, out], its columns in the order of `inputs`, its rows in that of `outputs`, if there are these.

    `dtype` is what a loader rounds dequantized values to; float32 on grids with offsets.
    """

    target: Tensor
    inputs: Metric
    outputs: Metric | None
    grid: Grid
    dtype: Dtype

    @property
    def columns(self) -> int:
        return self.target.shape[0]

    @property
    def rows(self) -> int:
        return self.target.shape[1]

    def flat(self, transposed: Tensor) -> Tensor:
        """`transposed` [in, out] as a file has it: flat, row by row."""
        upright = transposed[self.inputs.places].T
        return (upright if self.outputs is None else upright[self.outputs.places]).reshape(-1)

    def flat_rows(self, rows: slice) -> Tensor:
        """The target's `rows`, numbered as in a file, flat."""
        own = self.target[:, rows if self.outputs is None else self.outputs.places[rows]]
        return own[self.inputs.places].T.reshape(-1)

    def transposed(self, flat: Tensor) -> Tensor:
        """Undo `flat`."""
        return _transposed(flat.view(self.rows, self.columns), self.inputs, self.outputs)

    def spread(self, scales: Tensor, rows: slice) -> Callable[[slice], Tensor]:
        """The scale of every element of some `rows`, [columns, rows], for any columns.

        A block may run on from one row into the next.
        """
        return self._spread(scales if self.grid.offsets is None else scales[:, 0], rows)

    def wanted(self, scales: Tensor, rows: slice) -> Callable[[slice], Tensor]:
        """The target of some `rows` less the offsets of their blocks, [columns, rows], for any columns."""
        if self.grid.offsets is None:
            return lambda columns: self.target[columns, rows]
        offsets = self._spread(shifts(scales, self.grid), rows)
        return lambda columns: self.target[columns, rows] - offsets(columns)

    def _spread(self, scales: Tensor, rows: slice) -> Callable[[slice], Tensor]:
        if self.outputs is None:
            numbers = torch.arange(self.rows, device=scales.device)[rows]
        else:
            numbers = self.outputs.order[rows]
        order, block = self.inputs.order, self.grid.block
        if self.columns % block == 0:  # without an index for every element
            by_block = scales.reshape(self.rows, -1)[numbers].T.contiguous()
            places = _places(self.grid, self.columns, scales.device)
            return lambda columns: by_block[places[order[columns]] // block]
        return lambda columns: scales[(numbers * self.columns + order[columns, None]) // block]


def _places(grid: Grid, columns: int, device: torch.device) -> Tensor:
    """The place of each column in the order of blocks."""
    places = torch.arange(columns, device=device)
    return torch.argsort(columns_of(grid.order, device)) if grid.order else places


def transpose(target: Tensor, inputs: Metric, outputs: Metric | None, grid: Grid, dtype: Dtype) -> Layer:
    """The layer of `target` [out, in]."""
    if grid.offsets is not None:
        dtype = F32  # with an offset added after, a loader's cast is none of the product's
    return Layer(_transposed(target, inputs, outputs), inputs, outputs, grid, dtype)


def _transposed(upright: Tensor, inputs: Metric, outputs: Metric | None) -> Tensor:
    upright = upright if outputs is None else upright[outputs.order]
    return upright.T[inputs.order].contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Codes (uint8, [in, out]); and what each row adds to the loss, float64.

    Errors are not kept: they are four times as large, and `errors_of` finds them again.
    """

    codes: Tensor
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.sum())


def errors_of(layer: Layer, scales: Tensor, codes: Tensor, rows: slice = slice(None)) -> Tensor:
    """T - Q [in, rows], float32, of the `codes` [in, rows] of some rows."""
    errors = torch.empty_like(layer.target[:, rows], memory_format=torch.contiguous_format)
    spread, wanted = layer.spread(scales, rows), layer.wanted(scales, rows)
    for panel in panels(layer):
        values = dequantized(codes[panel], layer.grid, spread(panel), layer.dtype)
        torch.sub(wanted(panel), values, out=errors[panel])
    return errors


def rounded(layer: Layer, scales: Tensor) -> Solution:
    """The nearest codes, of some rows at a time: on a GPU they take several float32 copies of what is given."""
    device, columns, block = layer.target.device, layer.columns, layer.grid.block
    codes = torch.empty(layer.target.numel(), dtype=torch.uint8, device=device)
    step = block // math.gcd(columns, block)  # the fewest rows that end with a block
    for rows in stretches(layer.rows, max(STRETCH // step, 1) * step):
        part = slice(rows.start * columns, rows.stop * columns)
        own = scales[part.start // block : -(-part.stop // block)]
        kernels_for(device).nearest(layer.flat_rows(rows), layer.grid, own, codes[part])
    return coded(layer, scales, codes)


def coded(layer: Layer, scales: Tensor, codes: Tensor) -> Solution:
    """These `codes` (flat)."""
    return solution(layer, scales, layer.transposed(codes))


def solution(layer: Layer, scales: Tensor, codes: Tensor) -> Solution:
    """Solution with its loss: a sum of squares, which no cancellation can spoil."""
    if layer.outputs is not None:
        return Solution(codes, losses(layer, errors_of(layer, scales, codes)))
    parts = shared(layer, lambda rows: losses(layer, errors_of(layer, scales, codes[:, rows], rows)))
    return Solution(codes, torch.cat(parts))


def losses(layer: Layer, errors: Tensor) -> Tensor:
    """Loss of each row, float64.

    `errors` are [in, rows], of all rows, or of any of them where rows are on their own.
    """
    factor, found = (
        layer.inputs.factor,
        torch.zeros(errors.shape[1], dtype=torch.float64, device=errors.device),
    )
    for panel in panels(layer):
        seen = factor[: panel.stop, panel].T @ errors[: panel.stop]
        if layer.outputs is not None:
            seen = _by_triangle(seen, layer.outputs.factor)
        found += seen.double().square_().sum(0)
    return found


def _by_triangle(left: Tensor, upper: Tensor) -> Tensor:
    """`left` times an upper triangle, about half of it left out for being 0."""
    parts = stretches(upper.shape[0], _TRIANGLE)
    return torch.cat([left[:, : part.stop] @ upper[: part.stop, part] for part in parts], dim=1)


def better(layer: Layer, left: Solution, right: Solution) -> Solution:
    """Better of two solutions with the same scales, row by row where rows are on their own; else `left`."""
    if layer.outputs is not None:
        return right if right.loss < left.loss else left
    return better_rows(left, right)


def better_rows(left: Solution, right: Solution) -> Solution:
    takes_right = right.losses < left.losses
    return Solution(
        torch.where(takes_right, right.codes, left.codes),
        torch.where(takes_right, right.losses, left.losses),
    )


def panels(layer: Layer) -> list[slice]:
    """The columns, some at a time."""
    return stretches(layer.columns, PANEL)


def shared(layer: Layer, work: Callable[[slice], Part], most: int = DEVICE_ROWS) -> list[Part]:
    """Results of `work` for all rows, some at a time and never more than `most`, in order.

    On a CPU by as many threads as torch has, each with matrix products of its own: how many there are changes no bit.
    """
    if layer.target.device.type != "cpu":
        return [work(rows) for rows in stretches(layer.rows, min(most, DEVICE_ROWS))]
    parts = stretches(layer.rows, min(most, ROWS))
    # The setting is a thread's own: with more, products would be split as the number of threads has it.
    threads = min(torch.get_num_threads(), len(parts))
    with Pool(threads, "rows", functools.partial(torch.set_num_threads, 1)) as pool:
        return pool.map(work, parts)
