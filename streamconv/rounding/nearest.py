"""Nearest rounding: every entry to the closest value of the grid, byte for byte as bitsandbytes does it.

Source: bitsandbytes `backends/default/ops.py`, quantize_4bit and int8_vectorwise_quant.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamconv.grids import SMALLEST_DIVISOR, Grid, block_absmax, divide_by_scales
from streamconv.rounding.base import Context


@dataclass(frozen=True, slots=True)
class Nearest:
    """Scales are the blocks' greatest magnitudes, unless the context has fixed them."""

    name: str = "nearest"
    needs_noise: bool = False
    keeps_scales: bool = False

    def choose(self, target: Tensor, grid: Grid, context: Context) -> tuple[Tensor, Tensor]:
        """Codes and scales for `target`; see Rounding."""
        scales = absmax_scales(target, grid.block) if context.scales is None else context.scales
        return grid.nearest(divide_by_scales(target, scales, grid.block, grid.peak)), scales


def absmax_scales(target: Tensor, block: int) -> Tensor:
    """The scale (float32) bitsandbytes stores for every block of `target` (float32, flat)."""
    scales = block_absmax(target, block)
    if target.numel() % block:
        # Only here bitsandbytes also stores the floor: an all-zero short block has it, a whole one has 0.
        scales[-1:].clamp_(min=SMALLEST_DIVISOR)
    return scales
