"""Scales of a quantized weight as a plan knows them: chosen anew, or those of a base on the output's own grid."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.equalization.equalizer import Equalizer
from streamconv.formats.base import Encoder, Weight


@dataclass(frozen=True, slots=True)
class Fresh:
    """Scales that the rounding chooses."""


@dataclass(frozen=True, slots=True)
class OfBase:
    """Scales of the base's own grid stay; `keeps_parts`: and the very tensors that store them."""

    keeps_parts: bool = False


PlannedScales = Fresh | OfBase
FRESH = Fresh()


def lies_on_grid(
    weight: Weight, merge_base: Encoder | None, encoder: Encoder, equalizer: Equalizer | None
) -> bool:
    """Whether the base, rounded to `merge_base` if there is one, has codes of the output's grid as they are.

    A rescaled weight lies on no grid.
    """
    grid = weight.decoder.grid if merge_base is None else merge_base.grid
    return grid is not None and grid == encoder.grid and equalizer is None


def scales_of_base(
    weight: Weight, merge_base: Encoder | None, encoder: Encoder, equalizer: Equalizer | None
) -> PlannedScales:
    """Scales of an output that keeps those of its base wherever it can."""
    if not lies_on_grid(weight, merge_base, encoder, equalizer):
        return FRESH
    return OfBase(merge_base is None and stores_the_same(weight, encoder))


def stores_the_same(weight: Weight, encoder: Encoder) -> bool:
    """Whether `encoder` would store the scales of `weight` in the tensors that hold them now."""
    return weight.format == encoder.format and (weight.dtype == encoder.dtype or not encoder.rounds_scales)
