"""Search: nearest rounding with scales that make the squared error small.

A loader multiplies codes by a float a block, which need not be the block's greatest magnitude. Tried are, for the least
error Σ (t_j - a c_j)² of a block, fractions a of that magnitude, and then a = <c, t> / <c, c>, which is best for the
codes c of the best one so far (Lloyd 1982, "Least squares quantization in PCM"). No calibration text is needed. Where
there is some, errors are weighed by the mean square of the input that they are multiplied by, H_jj.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.grids import Grid, empty_scales
from streamconv.rounding.base import Context


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
            scales = context.as_stored(searched_scales(target, grid))
        return kernels.nearest(target, grid, scales, codes)


def searched_scales(target: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """The scales (float32, one a block) that were found for `target` (float32, flat).

    `weights` (float32, one an entry) say what the square of each error counts; None: all count alike.
    """
    scales = empty_scales(target.numel(), grid, target.device)
    kernels_for(target.device).search(target, grid, scales, weights)
    return scales
