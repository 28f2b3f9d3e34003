"""Roundings that need calibration text: rows of ROUNDINGS whose codes are chosen in a pass of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamconv.kernels.grids import Grid
from streamconv.rounding.base import Context


@dataclass(frozen=True, slots=True)
class Feedback:
    """Error feedback (`rounding/feedback.py`). It needs a whole weight and what its layer is given, never a cell."""

    name: str = "feedback"
    needs_noise: bool = False
    keeps_scales: bool = True
    calibrated: bool = True
    uses_text: bool = True
    searches_scales: bool = False

    def choose(self, target: Tensor, grid: Grid, context: Context, codes: Tensor) -> Tensor:
        """Never called: pass 1 has chosen, and its codes are copied."""
        del target, grid, context, codes
        raise AssertionError(f"{self.name} chooses codes a layer at a time, not by cells")
