"""A weight's columns gone through in order, each with the errors of others fed to it: feedback, descent, refit.

With H = M Mᵀ, M upper triangular, and E = T - Q:

    feedback  x_j = t_j + Σ_{k<j} e_k M_kj / M_jj    (GPTQ, arXiv 2210.17323, without its inverse)
    descent   x_j = t_j + Σ_{k≠j} e_k H_kj / H_jj
    both      q_j = nearest(x_j)

so the two differ by a matrix. The loss of a row is ||e M||². Feedback makes Σ_j M_jj² (x_j - q_j)² of it; a step of
descent never raises it.

With their scales held, rows do not know of each other. They are worked on some at a time by as many threads as torch
has, each with matrix products of its own: how many there are changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from streamconv.dtypes import Dtype
from streamconv.grids import Grid
from streamconv.kernels import kernels_for
from streamconv.rounding.metric import Metric

# Columns gone through one by one before a matrix product carries their errors to the others.
PANEL = 64
# Rows worked on at once by a thread of a CPU: enough for fast matrix products, few enough to share out; whole cells.
ROWS = 128
_DEVICE_ROWS = 4096
# What is added to the diagonal of a system of scales, in units of its mean: two blocks may have proportional effects.
_RIDGE = 1e-4

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight turned on its side: `target` [in, out], its columns in the order of `metric`.

    `dtype` is what a loader rounds dequantized values to.
    """

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

    def spread(self, scales: Tensor, rows: slice) -> Tensor:
        """The scale of every element of `rows`, [in, rows]. A block may run on from one row into the next."""
        first = torch.arange(self.rows, device=scales.device)[rows] * self.columns
        return scales[(first + self.metric.order[:, None]) // self.grid.block]


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Codes (uint8) and errors T - Q (float32), [in, out]; every row's loss, float64."""

    codes: Tensor
    errors: Tensor
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.sum())


def turn(target: Tensor, metric: Metric, grid: Grid, dtype: Dtype) -> Layer:
    """The layer of `target` [out, in]."""
    return Layer(target.T[metric.order].contiguous(), metric, grid, dtype)


def searched(layer: Layer) -> Tensor:
    """Scales with the least squared error found where inputs are taken to be uncorrelated: weighed by H_jj."""
    weights = layer.metric.matrix.diagonal()[layer.metric.places]
    block, columns = layer.grid.block, layer.columns

    def search(rows: slice) -> Tensor:
        values = layer.target[:, rows][layer.metric.places].T.reshape(-1)
        scales = torch.empty(-(-values.numel() // block), dtype=torch.float32, device=values.device)
        weighed = weights.repeat(values.numel() // columns)
        kernels_for(values.device).search(values, layer.grid, weighed, scales)
        return scales

    return torch.cat(_shared(layer, search))


def rounded(layer: Layer, scales: Tensor) -> Solution:
    """The nearest codes."""
    flat = layer.flat(layer.target)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    kernels_for(flat.device).nearest(flat, layer.grid, scales, codes)
    return coded(layer, scales, codes)


def coded(layer: Layer, scales: Tensor, codes: Tensor) -> Solution:
    """These `codes` (flat)."""
    values = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    kernels_for(codes.device).decode(codes, layer.grid, scales, layer.dtype, values)
    errors = layer.target - layer.turned(values)
    losses = _shared(layer, lambda rows: _losses(layer.metric.factor, errors[:, rows].contiguous()))
    return Solution(layer.turned(codes), errors, torch.cat(losses))


def fed(layer: Layer, scales: Tensor) -> Solution:
    """Codes by one pass of feedback."""
    factor = layer.metric.factor

    def feed(rows: slice) -> Solution:
        target, spread = layer.target[:, rows].contiguous(), layer.spread(scales, rows)
        codes, errors = torch.zeros_like(target, dtype=torch.uint8), torch.zeros_like(target)
        for panel in _panels(layer.columns):
            pull = factor[: panel.start, panel].T @ errors[: panel.start]
            _settle(layer, factor, panel, target, pull, spread, codes, errors, is_first=True)
        return Solution(codes, errors, _losses(factor, errors))

    return _joined(_shared(layer, feed))


def descended(layer: Layer, scales: Tensor, start: Solution, sweeps: int) -> Solution:
    """`start` after at most `sweeps` of descent over all columns; a row stays where one does not lower its loss."""
    matrix = layer.metric.matrix
    diagonal = matrix.diagonal()[:, None]

    def descend(rows: slice) -> Solution:
        target, spread = layer.target[:, rows].contiguous(), layer.spread(scales, rows)
        best = Solution(
            start.codes[:, rows].contiguous(), start.errors[:, rows].contiguous(), start.losses[rows]
        )
        for _ in range(sweeps):
            codes, errors = best.codes.clone(), best.errors.clone()
            for panel in _panels(layer.columns):
                pull = (matrix[:, panel].T @ errors).sub_(diagonal[panel] * errors[panel])
                _settle(layer, matrix, panel, target, pull, spread, codes, errors, is_first=False)
            if torch.equal(codes, best.codes):
                break
            best = better_rows(best, Solution(codes, errors, _losses(layer.metric.factor, errors)))
        return best

    return _joined(_shared(layer, descend)) if sweeps else start


def better_rows(left: Solution, right: Solution) -> Solution:
    """Of two solutions with the same scales the better one, row by row; `left` where they are even."""
    takes_right = right.losses < left.losses
    return Solution(
        torch.where(takes_right, right.codes, left.codes),
        torch.where(takes_right, right.errors, left.errors),
        torch.where(takes_right, right.losses, left.losses),
    )


def refitted(layer: Layer, scales: Tensor, solution: Solution) -> Tensor:
    """The scales with which the codes of `solution` have the least loss; for weights whose blocks end with rows.

    With v_g a row's values in block g and 0 elsewhere they are the old ones plus δ, Σ_h v_gᵀ H v_h δ_h = v_gᵀ H e. A
    scale that would not stay on its side of 0 is kept.
    """
    changes = _shared(
        layer, lambda rows: _scale_changes(layer, solution.codes[:, rows], solution.errors[:, rows])
    )
    fitted = scales + torch.cat(changes)
    return torch.where(fitted * scales > 0, fitted, scales)


def _scale_changes(layer: Layer, codes: Tensor, errors: Tensor) -> Tensor:
    """δ above of some rows' blocks, flat."""
    matrix, places, block = layer.metric.matrix, layer.metric.places, layer.grid.block
    values = layer.grid.decode(codes)[places].div_(layer.grid.peak)
    count = layer.columns // block
    wanted = (matrix @ errors)[places].mul_(values).view(count, block, -1).sum(1)
    system = wanted.new_empty(count, *wanted.shape)
    for number, columns in enumerate(places.view(count, block)):
        products = matrix[columns][:, places].T @ values[number * block : (number + 1) * block]
        system[number] = products.mul_(values).view(count, block, -1).sum(1)
    systems = system.permute(2, 0, 1).double()
    diagonal = systems.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    changes: Tensor = torch.linalg.solve(systems, wanted.T.double())
    return changes.float().reshape(-1)


def _shared(layer: Layer, work: Callable[[slice], Part]) -> list[Part]:
    """What `work` makes of all rows, some at a time, in order."""
    is_cpu = layer.target.device.type == "cpu"
    height = ROWS if is_cpu else _DEVICE_ROWS
    parts = [slice(first, min(first + height, layer.rows)) for first in range(0, layer.rows, height)]
    if not is_cpu:
        return [work(part) for part in parts]
    threads = min(torch.get_num_threads(), len(parts))
    # The setting is a thread's own: with more, products would be split as the number of threads has it.
    with ThreadPoolExecutor(threads, "streamconv-rows", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(work, parts))


def _joined(parts: list[Solution]) -> Solution:
    return Solution(
        torch.cat([part.codes for part in parts], dim=1),
        torch.cat([part.errors for part in parts], dim=1),
        torch.cat([part.losses for part in parts]),
    )


def _panels(columns: int) -> list[slice]:
    return [slice(first, min(first + PANEL, columns)) for first in range(0, columns, PANEL)]


def _settle(
    layer: Layer,
    matrix: Tensor,
    panel: slice,
    target: Tensor,
    pull: Tensor,
    spread: Tensor,
    codes: Tensor,
    errors: Tensor,
    *,
    is_first: bool,
) -> None:
    """Choose the codes of `panel`; `pull` are the products of `matrix` with the errors of other columns."""
    diagonal = matrix.diagonal()[panel]
    kernels_for(target.device).settle(
        target[panel],
        pull.div_(diagonal[:, None]),
        matrix[panel, panel] / diagonal,
        layer.grid,
        spread[panel],
        layer.dtype,
        codes[panel],
        errors[panel],
        is_first,
    )


def _losses(factor: Tensor, errors: Tensor) -> Tensor:
    """||e M||² of every row: a sum of squares, which no cancellation can spoil."""
    losses = torch.zeros(errors.shape[1], dtype=torch.float64, device=errors.device)
    for panel in _panels(errors.shape[0]):
        seen = factor[: panel.stop, panel].T @ errors[: panel.stop]
        losses += seen.double().square_().sum(0)
    return losses
