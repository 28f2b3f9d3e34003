"""Nearest rounding: every entry to the closest value of the grid, byte for byte as bitsandbytes does it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.grids import Grid
from streamconv.rounding.base import Context, starting_scales


@dataclass(frozen=True, slots=True)
class Nearest:
    """Scales are the blocks' greatest magnitudes over the grid's reach, unless the context has fixed them."""

    name: str = "nearest"
    needs_noise: bool = False
    keeps_scales: bool = False
    calibrated: bool = False
    uses_text: bool = False
    searches_scales: bool = False

    def choose(self, target: Tensor, grid: Grid, context: Context, codes: Tensor) -> Tensor:
        """See Rounding."""
        scales = context.scales
        if scales is None:
            scales = context.as_stored(starting_scales(target, grid))
        return kernels_for(target.device).nearest(target, grid, scales, codes)
