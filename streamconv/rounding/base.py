"""Interface of a rounding, which chooses the codes of a cell from values that lie between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.grids import Grid, empty_scales


@dataclass(frozen=True, slots=True)
class Context:
    """Facts about a cell besides its target. All tensors are flat, one entry an element or a block.

    `codes`  uint8: the base's own codes, where the base lies on this grid; else None.
    `scales` float32, one a block (with offsets two): the effective scales to use, already fixed; None: choose them.
    `base`   float32: what the base decodes to, which the target is an update of; needed where `codes` are given.
    `noise`  float32 in [0, 1): one number an element, for roundings that ask for it.
    `stored` what a loader will make of scales that are chosen, where storing rounds each on its own: codes are then
             chosen with that. None: what is chosen is what is stored, or that is known too late.
    """

    codes: Tensor | None
    scales: Tensor | None
    base: Tensor | None
    noise: Tensor | None
    stored: Callable[[Tensor], Tensor] | None = None

    def as_stored(self, scales: Tensor) -> Tensor:
        return scales if self.stored is None else self.stored(scales)


def starting_scales(target: Tensor, grid: Grid) -> Tensor:
    """The scales of nearest rounding (float32, one a block) for `target` (float32, flat)."""
    scales = empty_scales(target.numel(), grid, target.device)
    return kernels_for(target.device).starting_scales(target, grid, scales)


class Rounding(Protocol):
    """One row of ROUNDINGS in `rounding/__init__.py`."""

    @property
    def name(self) -> str: ...

    @property
    def needs_noise(self) -> bool: ...

    @property
    def keeps_scales(self) -> bool:
        """Whether the base's own scales stay, where the base lies on the output's grid."""

    @property
    def calibrated(self) -> bool:
        """Whether codes are chosen before, a decoder layer at a time, by what a text makes of its inputs."""

    @property
    def uses_text(self) -> bool:
        """Whether calibration text, where there is some, tells it what errors count."""

    @property
    def searches_scales(self) -> bool:
        """Whether scales are chosen with codes in view. Where storing moves them, codes are then chosen anew."""

    def choose(self, target: Tensor, grid: Grid, context: Context, codes: Tensor) -> Tensor:
        """Write codes (uint8, one an element) for `target` (float32, flat); return scales (float32, one a block)."""
