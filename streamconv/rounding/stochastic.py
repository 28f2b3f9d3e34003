"""Stochastic rounding: up or down at random, so that the expected value is the target itself.

With x between the grid's neighbours lo and hi, P(hi) = (x - lo) / (hi - lo) (Gupta et al. 2015,
arXiv 1502.02551, §3). A delta far smaller than the grid's step, which nearest rounding erases, survives on
average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.grids import Grid, divide_by_scales
from streamconv.rounding.base import Context
from streamconv.rounding.nearest import absmax_scales


@dataclass(frozen=True, slots=True)
class Stochastic:
    """Keeps the base's scales and starts from its codes where it lies on the output's grid.

    An entry is then known as code plus delta, exactly: one without delta keeps its code whatever the noise,
    and the rounding of the decoded base to 16 bit plays no part. Beyond a block's scale, the end's
    code is chosen.
    """

    name: str = "stochastic"
    needs_noise: bool = True
    keeps_scales: bool = True

    def choose(self, target: Tensor, grid: Grid, context: Context) -> tuple[Tensor, Tensor]:
        """Codes and scales for `target`; see Rounding. `context.noise` must be there."""
        assert context.noise is not None, "stochastic rounding was not given its noise"
        if context.scales is None:
            scales = absmax_scales(target, grid.block)
            x = divide_by_scales(target, scales, grid.block, grid.peak)
        else:
            scales = context.scales
            x = _in_units_of_scale(target, scales, grid, context)
        x.clamp_(*grid.limits)
        lower, upper = grid.neighbours(x)
        low = grid.decode(lower)
        gap = grid.decode(upper).sub_(low)
        goes_up = gap.mul_(context.noise) < x.sub_(low)
        codes = upper.sub_(lower).mul_(goes_up.view(torch.uint8)).add_(lower)
        return codes, scales


def _in_units_of_scale(target: Tensor, scales: Tensor, grid: Grid, context: Context) -> Tensor:
    if context.codes is None:
        return divide_by_scales(target, scales, grid.block, grid.peak)
    assert context.delta is not None, "the base's codes were given without the delta"
    x = divide_by_scales(context.delta, scales, grid.block, grid.peak)
    return x.add_(grid.decode(context.codes))
