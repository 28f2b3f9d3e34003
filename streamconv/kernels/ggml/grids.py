"""Grids of ggml's types: codes and scales of their super-blocks, as roundings know those of any grid.

A grid counts codes from 0 and has values from -1 to 1: its scale is a power of two times the one that a loader
multiplies with (`half`), so that nothing is rounded between the two. All are kept in the order of a file, and whole
super-blocks are worked on, as scales of one may be nested.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.base import block_dots
from streamconv.kernels.ggml import block_kernels_for
from streamconv.kernels.ggml.packing import codes_of
from streamconv.kernels.ggml.scales import LARGEST_HALF
from streamconv.kernels.ggml.types import BlockType
from streamconv.kernels.grids import TableGrid, integers

# Types in whose blocks errors of great values count more: cut short, these cost a model more than their squared errors
# say. llama.cpp's quantizer weighs errors of these two so, too.
_WEIGHED = ("q4_k", "q5_k")
# Types whose nearest rounding searches, as llama.cpp's does: the head of most files is of this one.
_SEARCHED = ("q6_k",)


@dataclass(frozen=True, slots=True)
class BlockTypeRule:
    """A type's own rules for scales, in units of its grid; NaN for a super-block that no 16-bit float could scale."""

    kind: BlockType

    def start(self, values: Tensor) -> Tensor:
        """See ScaleRule."""
        if self.kind.name in _SEARCHED:
            return self.fit(values.reshape(-1), None)
        whole = values.reshape(-1, self.kind.super_block)
        return self._known(whole, block_kernels_for(values.device).starting_scales(self.kind, whole))

    def fit(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """See ScaleRule."""
        whole = values.reshape(-1, self.kind.super_block)
        if weights is None and self.kind.name in _WEIGHED:
            weights = _by_magnitude(values, self.kind.block)
        parts = None if weights is None else weights.reshape(-1, self.kind.super_block)
        return self._known(whole, block_kernels_for(values.device).fit(self.kind, whole, parts))

    def _known(self, values: Tensor, scales: Tensor) -> Tensor:
        """The scales in units of the grid, where values are in reach of 16-bit floats."""
        low, high = kernels_for(values.device).ranges(values, self.kind.super_block)
        is_known = (low >= -LARGEST_HALF) & (high <= LARGEST_HALF)
        by_super_block = in_grid_units(self.kind, scales).view(len(values), -1)
        return torch.where(is_known[:, None], by_super_block, torch.nan).view(scales.shape)


def _by_magnitude(values: Tensor, block: int) -> Tensor:
    """A weight for the square of each error: the value's magnitude and its block's root mean square."""
    size = block_dots(values, values, block).div_(block).sqrt_()
    found = values.abs().view(-1, block).add_(size[:, None])
    # Errors in a block of zeros count as any.
    return found.masked_fill_(size[:, None] == 0, 1.0).view(values.shape)


def half(kind: BlockType) -> int:
    """Stored scales that one of the grid is: half the number of codes."""
    codes = codes_of(kind)
    return (codes.highest + 1) // (2 if codes.has_offset else 1)


@functools.cache
def grid_of(kind: BlockType) -> TableGrid:
    """The grid of a type that is written. Of q8_0 it has -128, which is read though ggml's quantizer never writes it:
    with the scales of the type's own rules it is nearest to few values.
    """
    known = integers(kind.name, half(kind).bit_length(), kind.block)
    rule = BlockTypeRule(kind)
    return replace(known, reach=1.0, rule=rule, offsets=rule if codes_of(kind).has_offset else None)


def in_grid_units(kind: BlockType, scales: Tensor) -> Tensor:
    """Scales of a grid from those that a loader multiplies with; offsets are the same in both."""
    return _times(kind, scales, half(kind))


def as_loaded(kind: BlockType, scales: Tensor) -> Tensor:
    """Undo `in_grid_units`."""
    return _times(kind, scales, 1 / half(kind))


def stored(kind: BlockType, scales: Tensor) -> Tensor:
    """Scales of a grid that can be stored, nearest to those of whole super-blocks; what is not finite stays so."""
    is_finite = scales.isfinite()
    wished = as_loaded(kind, torch.where(is_finite, scales, 0))
    found = block_kernels_for(scales.device).stored(kind, wished)
    return torch.where(is_finite, in_grid_units(kind, found), scales)


def packed(kind: BlockType, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write super-blocks of a grid's codes (uint8, flat) and scales, which can be stored, to `out` (uint8, flat)."""
    kernels, raw = block_kernels_for(codes.device), out.view(-1, kind.bytes)
    own = codes if codes_of(kind).has_offset else codes - half(kind)
    known = torch.nan_to_num(as_loaded(kind, scales), nan=0.0)
    kernels.pack(kind, own.view(-1, kind.super_block), known, raw)


def unpacked(kind: BlockType, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, flat) and scales of a grid from whole super-blocks (uint8, flat), which hold just these."""
    blocks = raw.view(-1, kind.bytes)
    codes = torch.empty(len(blocks), kind.super_block, dtype=torch.uint8, device=raw.device)
    scales = block_kernels_for(raw.device).unpack(kind, blocks, codes)
    own = codes if codes_of(kind).has_offset else codes.add_(half(kind))
    return own.view(-1), in_grid_units(kind, scales)


def overwrite(kind: BlockType, codes: Tensor, raw: Tensor) -> None:
    """Write a grid's codes (uint8, flat) into super-blocks (uint8, flat) whose scales stay, to the byte."""
    own = codes if codes_of(kind).has_offset else codes - half(kind)
    block_kernels_for(raw.device).pack_codes(kind, own.view(-1, kind.super_block), raw.view(-1, kind.bytes))


def _times(kind: BlockType, scales: Tensor, factor: float) -> Tensor:
    if not codes_of(kind).has_offset:
        return scales * factor
    found = scales.clone()
    found[..., 0].mul_(factor)
    return found
