"""A weight's columns gone through in order, each with the errors of others fed to it: feedback, descent, refit.

With H = M Mᵀ, M upper triangular, and E = T - Q:

    feedback  x_j = t_j + Σ_{k<j} e_k M_kj / M_jj    (GPTQ, arXiv 2210.17323, without its inverse)
    descent   x_j = t_j + Σ_{k≠j} e_k H_kj / H_jj
    both      q_j = nearest(x_j)

so the two differ by a matrix. The error of a row is ||e M||². Feedback makes Σ_j M_jj² (x_j - q_j)² of it; a step of
descent never raises it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.dtypes import Dtype
from streamconv.grids import Grid
from streamconv.kernels import kernels_for
from streamconv.rounding.metric import Metric

# Columns gone through one by one before a matrix product carries their errors to the others.
PANEL = 64
# Rows whose scales are fitted at once.
_REFIT_ROWS = 512
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight turned on its side, `target` [in, out], its columns in the order of `metric`."""

    target: Tensor
    metric: Metric
    grid: Grid
    dtype: Dtype

    @property
    def columns(self) -> int:
        return self.target.shape[0]

    @property
    def rows(self) -> int:
        return self.target.shape[1]

    def flat(self, turned: Tensor) -> Tensor:
        """`turned` [in, out] as a file has it: flat, row by row."""
        return turned[self.metric.places].T.reshape(-1)

    def turned(self, flat: Tensor) -> Tensor:
        """Undo `flat`."""
        return flat.view(self.rows, self.columns).T[self.metric.order].contiguous()

    def scales_of(self, scales: Tensor, columns: slice) -> Tensor:
        """The scale of every element of `columns`. A block may run on from one row into the next."""
        first = torch.arange(self.rows, device=scales.device) * self.columns
        return scales[(first + self.metric.order[columns, None]) // self.grid.block]


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Codes (uint8) and errors T - Q (float32) [in, out] with the effective `scales`; every row's loss, float64."""

    scales: Tensor
    codes: Tensor
    errors: Tensor
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.sum())


def turn(target: Tensor, metric: Metric, grid: Grid, dtype: Dtype) -> Layer:
    """The layer of `target` [out, in]; `dtype` is what a loader rounds dequantized values to."""
    return Layer(target.T[metric.order].contiguous(), metric, grid, dtype)


def rounded(layer: Layer, scales: Tensor, codes: Tensor | None = None) -> Solution:
    """The nearest codes with `scales`, or these `codes` [in, out]."""
    kernels = kernels_for(scales.device)
    count = layer.target.numel()
    if codes is None:
        flat = torch.empty(count, dtype=torch.uint8, device=scales.device)
        kernels.nearest(layer.flat(layer.target), layer.grid, scales, flat)
        codes = layer.turned(flat)
    else:
        flat = layer.flat(codes)
    values = torch.empty(count, dtype=torch.float32, device=scales.device)
    kernels.decode(flat, layer.grid, scales, layer.dtype, values)
    errors = layer.target - layer.turned(values)
    return Solution(scales, codes, errors, _losses(layer, errors))


def fed(layer: Layer, scales: Tensor) -> Solution:
    """Codes by one pass of feedback."""
    codes = torch.zeros_like(layer.target, dtype=torch.uint8)
    errors = torch.zeros_like(layer.target)
    factor = layer.metric.factor
    for panel in _panels(layer):
        pull = factor[: panel.start, panel].T @ errors[: panel.start]
        _settle(layer, scales, panel, factor, pull, codes, errors, is_first=True)
    return Solution(scales, codes, errors, _losses(layer, errors))


def descended(layer: Layer, start: Solution) -> Solution:
    """`start` after a sweep of descent over all columns; itself where that did not lower the loss."""
    codes, errors = start.codes.clone(), start.errors.clone()
    matrix = layer.metric.matrix
    for panel in _panels(layer):
        pull = matrix[:, panel].T @ errors
        pull.sub_(matrix.diagonal()[panel, None] * errors[panel])
        _settle(layer, start.scales, panel, matrix, pull, codes, errors, is_first=False)
    found = Solution(start.scales, codes, errors, _losses(layer, errors))
    return better_rows(found, start)


def better_rows(left: Solution, right: Solution) -> Solution:
    """Of two solutions with the same scales the better one, row by row; `left` where they are even."""
    takes_right = right.losses < left.losses
    if not bool(takes_right.any()):
        return left
    return Solution(
        left.scales,
        torch.where(takes_right, right.codes, left.codes),
        torch.where(takes_right, right.errors, left.errors),
        torch.where(takes_right, right.losses, left.losses),
    )


def refitted(layer: Layer, solution: Solution) -> Tensor:
    """The scales with which the codes of `solution` have the least loss; for weights whose blocks end with rows.

    With v_g a row's values in block g and 0 elsewhere, they are its old ones plus δ, Σ_h v_gᵀ H v_h δ_h = v_gᵀ H e. A
    scale that would not stay positive is kept.
    """
    scales = solution.scales.view(layer.rows, -1)
    changes = [
        _scale_changes(layer, solution, slice(first, first + _REFIT_ROWS))
        for first in range(0, layer.rows, _REFIT_ROWS)
    ]
    fitted = scales + torch.cat(changes)
    return torch.where(fitted * scales.sign() > 0, fitted, scales).view(-1)


def _scale_changes(layer: Layer, solution: Solution, rows: slice) -> Tensor:
    """δ above for some `rows`: [rows, blocks of a row]."""
    matrix, places, block = layer.metric.matrix, layer.metric.places, layer.grid.block
    values = layer.grid.decode(solution.codes[:, rows])[places].div_(layer.grid.peak)
    count = layer.columns // block
    products = (matrix @ solution.errors[:, rows])[places].mul_(values)
    right = products.view(count, block, -1).sum(1)
    left = right.new_empty(count, count, right.shape[1])
    for number, columns in enumerate(places.view(count, block)):
        within = matrix[columns][:, places].T @ values[number * block : (number + 1) * block]
        left[number] = within.mul_(values).view(count, block, -1).sum(1)
    system, wanted = left.permute(2, 0, 1).double(), right.T.double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(system, wanted).float()


def _panels(layer: Layer) -> list[slice]:
    return [slice(first, min(first + PANEL, layer.columns)) for first in range(0, layer.columns, PANEL)]


def _settle(
    layer: Layer,
    scales: Tensor,
    panel: slice,
    matrix: Tensor,
    pull: Tensor,
    codes: Tensor,
    errors: Tensor,
    *,
    is_first: bool,
) -> None:
    """Choose the codes of `panel`; `pull` are the products of `matrix` with the errors of other columns."""
    diagonal = matrix.diagonal()[panel]
    coupling = matrix[panel, panel] / diagonal
    kernels_for(scales.device).settle(
        layer.target[panel],
        pull.div_(diagonal[:, None]),
        coupling,
        layer.grid,
        layer.scales_of(scales, panel),
        layer.dtype,
        codes[panel],
        errors[panel],
        is_first,
    )


def _losses(layer: Layer, errors: Tensor) -> Tensor:
    """||e M||² of every row: a sum of squares, which no cancellation can spoil."""
    losses = torch.zeros(layer.rows, dtype=torch.float64, device=errors.device)
    for panel in _panels(layer):
        seen = layer.metric.factor[: panel.stop, panel].T @ errors[: panel.stop]
        losses += seen.double().square_().sum(0)
    return losses
