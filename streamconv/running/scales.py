"""Scales of a quantized weight while it is rewritten: as planned, or known for all of it before a code is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from streamconv.formats.base import Encoder
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
    """Scales that were chosen before the first code, other than the base's: `stored` and `effective` as in Kept."""

    stored: Tensor
    effective: Tensor


Scales = Fresh | OfBase | Kept | Fixed
"""Fresh: the rounding chooses those of each cell. OfBase: a cell has those that its base was rounded with."""


def kept_scales(
    planned: OfBase, base: Tensor, stored: Tensor | None, encoder: Encoder, side: Mapping[str, Tensor]
) -> Kept:
    """The base's scales as the output has them.

    `base` are effective scales of the base, float32, one a block; `stored` what they were made of, if the encoder is to
    be given that; `side` the base's parts other than the main one.
    """
    given = base if stored is None else stored
    if planned.keeps_parts:
        return Kept(given, given, side)
    return Kept(given, encoder.effective_scales(given), None)
