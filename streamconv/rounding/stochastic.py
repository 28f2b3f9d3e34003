"""Stochastic rounding: up or down at random, so that the expected value is the target itself.

With x between the grid's neighbours lo and hi, P(hi) = (x - lo) / (hi - lo) (Gupta et al. 2015,
arXiv 1502.02551, §3). A delta far smaller than the grid's step, which nearest rounding erases, survives on
average.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamconv.kernels import Start, kernels_for
from streamconv.kernels.grids import Grid
from streamconv.rounding.base import Context, starting_scales
from streamconv.rounding.search import scales_to_store


@dataclass(frozen=True, slots=True)
class Stochastic:
    """Keeps the base's scales and starts from its codes where it lies on the output's grid.

    An entry is then known as code plus delta, exactly: one without delta keeps its code whatever the noise,
    and the rounding of the decoded base to 16 bit plays no part. Beyond a block's scale, the end's
    code is chosen. `searches`: scales that nothing fixes are searched for, which finds those of a grid that the base
    was expanded from; else they are the blocks' greatest magnitudes over the grid's reach.
    """

    name: str = "stochastic"
    needs_noise: bool = True
    keeps_scales: bool = True
    calibrated: bool = False
    uses_text: bool = False
    searches_scales: bool = False
    searches: bool = False

    def choose(self, target: Tensor, grid: Grid, context: Context, codes: Tensor) -> Tensor:
        """See Rounding. `context.noise` must be there."""
        assert context.noise is not None, "stochastic rounding was not given its noise"
        start = None
        if context.scales is not None and context.codes is not None:
            assert context.base is not None, "the base's codes were given without the base"
            start = Start(context.codes, context.base)
        scales = context.scales
        if scales is None:
            scales = self._chosen_scales(target, grid, context)
        return kernels_for(target.device).stochastic(target, grid, scales, start, context.noise, codes)

    def _chosen_scales(self, target: Tensor, grid: Grid, context: Context) -> Tensor:
        if self.searches:
            return scales_to_store(target, grid, context)
        return context.as_stored(starting_scales(target, grid))
