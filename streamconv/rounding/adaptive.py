"""Adaptive rounding, of a base on the output's own grid: at random where the update is small, to the nearest where not.

Nearest rounding erases an update that is small against the grid's step, and stochastic rounding keeps it; of one that
is no longer small nearest rounding keeps what matters, with half the error. It is decided weight by weight, by

    mean |D| / mean step of the weight's first 64 rows,

the step of an entry being the mean of the gaps beside its code's value, times its block's scale.

A base in 16 bit may lie on such a grid without saying so: it was expanded from a quantized file. Rounding it to the
grid then leaves hardly an error, where of other weights a quarter of a step is left on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.dtypes import F32
from streamconv.kernels import kernels_for
from streamconv.kernels.base import block_dots
from streamconv.kernels.grids import Grid, code_steps
from streamconv.kernels.ordered import gathered
from streamconv.rounding.base import Context, Rounding
from streamconv.rounding.nearest import Nearest
from streamconv.rounding.stochastic import Stochastic

# From this ratio on to the nearest. Predictions of the model are about equally far from the target's on either side of
# it: measured by `tools/study/run sizes`, docs/why-merging-loses-quality.md.
NEAREST_FROM = 0.4
# Mean error over mean step, of a base that is rounded without its update, below which it lies on the grid.
ON_GRID_BELOW = 0.12
_STRETCH = 1 << 14


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Choice between two roundings for a weight; `settled` makes it once the weight's first rows are there.

    `elsewhere`: that of weights that lie on no grid of the output. `looks`: whether it is looked for by rounding the
    first rows, where the base does not tell; scales are then searched for in either case.
    """

    name: str = "adaptive"
    needs_noise: bool = True
    keeps_scales: bool = True
    calibrated: bool = False
    uses_text: bool = False
    searches_scales: bool = False
    elsewhere: Rounding = Nearest()  # noqa: RUF009  (a frozen dataclass)
    looks: bool = False

    def choose(self, target: Tensor, grid: Grid, context: Context, codes: Tensor) -> Tensor:
        """Never called: by then it is one of the two."""
        del target, grid, context, codes
        raise AssertionError(f"{self.name} rounding was not settled before a weight's first cell")

    def settled(self, ratio: float | None) -> Rounding:
        """Rounding for an update of that ratio, which is None where the base does not lie on the grid."""
        if ratio is None:
            return self.elsewhere
        return Nearest() if ratio >= NEAREST_FROM else Stochastic()

    def settled_by_look(self, ratio: float | None) -> Rounding:
        """The same of a weight whose grid was found by looking, so that its scales have to be found as well."""
        is_small = ratio is not None and ratio < NEAREST_FROM
        return Stochastic(keeps_scales=False, searches=True) if is_small else self.elsewhere

    def ratio_by_look(self, target: Tensor, base: Tensor, grid: Grid, context: Context) -> float | None:
        """The ratio of an update whose `base` (float32, flat, as `target`) lies on `grid`; None where it does not."""
        kernels, rounded = kernels_for(base.device), torch.empty_like(base)
        codes = torch.empty(base.shape, dtype=torch.uint8, device=base.device)
        scales = self.elsewhere.choose(base, grid, context, codes)
        kernels.decode(codes, grid, scales, F32, rounded)
        if delta_to_step(rounded, base, codes, scales, grid) >= ON_GRID_BELOW:
            return None
        return delta_to_step(target, base, codes, scales, grid)


def delta_to_step(target: Tensor, base: Tensor, codes: Tensor, scales: Tensor, grid: Grid) -> float:
    """The ratio above: `target` and `base` float32, `codes` uint8, all flat; `scales` float32, one a block."""
    sums = torch.zeros(2, dtype=torch.float64, device=target.device)  # asked for once: a device is waited for
    target, base, codes = (gathered(kernels_for(target.device), each, grid) for each in (target, base, codes))
    of_codes = code_steps(grid).to(target.device)
    # A few blocks at a time: a cell of a wide weight is large, and no plan counts more of it than its roundings need.
    length = max(1, _STRETCH // grid.block)
    for first in range(0, len(scales), length):
        part = slice(first * grid.block, (first + length) * grid.block)
        sums[0] += (target[part] - base[part]).abs().sum(dtype=torch.float64)
        sums[1] += _sum_of_steps(codes[part], scales[first : first + length], grid, of_codes)
    moved, steps = sums.tolist()
    return moved / steps if steps else float("inf")


def sum_of_steps(codes: Tensor, scales: Tensor, grid: Grid) -> float:
    """Sum of the steps of entries that have these `codes` (uint8, flat); `scales` float32, one a block."""
    return float(_sum_of_steps(codes, scales, grid, code_steps(grid).to(codes.device)))


def _sum_of_steps(codes: Tensor, scales: Tensor, grid: Grid, of_codes: Tensor) -> Tensor:
    """Sum of those steps, float64 [], on the device of the codes; `of_codes` are the steps of every code."""
    steps = of_codes.index_select(0, codes.to(torch.int32)).double()
    sums = block_dots(steps, torch.ones_like(steps), grid.block)
    factors = scales if grid.offsets is None else scales[:, 0]
    return (sums * factors.double().abs()).sum() / grid.peak
