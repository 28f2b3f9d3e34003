"""Scales of a quantized weight while it is rewritten: as planned, or known for all of it before a code is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from streamconv.formats.base import Encoder, Nesting
from streamconv.planning.scales import Fresh, OfBase


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Scales of the base, which stay: `stored` are what the encoder is given, `effective` what a loader makes of them.

    Both are float32, one a block. `parts`: the tensors that store them, written as they are; None: encode them.
    """

    stored: Tensor
    effective: Tensor
    parts: Mapping[str, Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """Scales that were chosen before the first code, other than the base's, or are all known: fields as in Kept."""

    stored: Tensor
    effective: Tensor
    parts: Mapping[str, Tensor] | None = None


Scales = Fresh | OfBase | Kept | Fixed
"""Fresh: the rounding chooses those of each cell. OfBase: a cell has those that its base was rounded with."""


def fixed_scales(scales: Tensor, encoder: Encoder) -> Fixed:
    """All `scales` of a weight (float32, one a block) as `encoder` will store them; nested once, where they are."""
    if encoder.nested and isinstance(encoder, Nesting):
        parts, effective = encoder.nest(scales)
        return Fixed(scales, effective, parts)
    return Fixed(scales, encoder.effective_scales(scales))


def kept_scales(
    planned: OfBase, base: Tensor, stored: Fixed | None, encoder: Encoder, side: Mapping[str, Tensor]
) -> Kept:
    """The base's scales as the output has them.

    `base` are effective scales of the base, float32, one a block; `stored` those that were rounded as the encoder
    rounds them, where they are; `side` the base's parts other than the main one.
    """
    if planned.keeps_parts:
        given = base if stored is None else stored.stored
        return Kept(given, given, side)
    known = fixed_scales(base, encoder) if stored is None else stored
    return Kept(known.stored, known.effective, known.parts)
