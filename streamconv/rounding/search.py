"""Search: nearest rounding with scales that make the squared error small.

A loader multiplies codes by a float a block, which need not be the block's greatest magnitude. Tried are, for the least
error Σ (t_j - a c_j)² of a block, fractions a of that magnitude, and then a = <c, t> / <c, c>, which is best for the
codes c of the best one so far (Lloyd 1982, "Least squares quantization in PCM"). No calibration text is needed. Where
there is some, errors are weighed by the mean square of the input that they are multiplied by, H_jj.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.dtypes import F32
from streamconv.kernels import kernels_for
from streamconv.kernels.base import block_dots
from streamconv.kernels.grids import Grid, TableGrid, empty_scales
from streamconv.kernels.ordered import gathered
from streamconv.rounding.base import Context, starting_scales


@dataclass(frozen=True, slots=True)
class Search:
    """Codes are the nearest with what a loader makes of the scales: where these are stored rounded, they come first."""

    name: str = "search"
    needs_noise: bool = False
    keeps_scales: bool = False
    calibrated: bool = False
    uses_text: bool = True
    searches_scales: bool = True

    def choose(self, target: Tensor, grid: Grid, context: Context, codes: Tensor) -> Tensor:
        """See Rounding."""
        kernels, scales = kernels_for(target.device), context.scales
        if scales is None:
            scales = scales_to_store(target, grid, context)
        return kernels.nearest(target, grid, scales, codes)


def scales_to_store(target: Tensor, grid: Grid, context: Context) -> Tensor:
    """The scales (float32, one a block) that are found for `target`, as a loader will have them."""
    scales = searched_scales(target, grid)
    if context.stored is not None and ratios_of(grid):
        scales = stored_scales(target, grid, scales, context.stored)
    return context.as_stored(scales)


def ratios_of(grid: Grid) -> tuple[float, ...]:
    """See TableGrid; none where storing hardly moves scales."""
    return grid.scale_ratios if isinstance(grid, TableGrid) else ()


def stored_scales(
    target: Tensor,
    grid: Grid,
    scales: Tensor,
    stored: Callable[[Tensor], Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """The best for `target` of what storing makes of `scales`, and of nearest rounding's times the grid's ratios."""
    start, best = starting_scales(target, grid), stored(scales)
    least = _losses(target, grid, best, weights)
    for ratio in ratios_of(grid):
        trial = stored(start * ratio)
        found = _losses(target, grid, trial, weights)
        is_better = found < least
        best, least = torch.where(is_better, trial, best), torch.where(is_better, found, least)
    return best


def _losses(target: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None) -> Tensor:
    """Squared error of every block, its codes the nearest."""
    kernels = kernels_for(target.device)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    values = torch.empty_like(target)
    kernels.nearest(target, grid, scales, codes)
    kernels.decode(codes, grid, scales, F32, values)
    error = gathered(kernels, torch.sub(target, values, out=values), grid)
    return block_dots(
        error, error if weights is None else error * gathered(kernels, weights, grid), grid.block
    )


def searched_scales(target: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """The scales (float32, one a block) that were found for `target` (float32, flat).

    `weights` (float32, one an entry) say what the square of each error counts; None: all count alike.
    """
    scales = empty_scales(target.numel(), grid, target.device)
    kernels_for(target.device).search(target, grid, scales, weights)
    return scales
