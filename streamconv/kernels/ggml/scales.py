"""Scales that a ggml type can store, nearest to those wished for, in torch: what the compiled loops must equal.

Wished scales are finite. One of a block of its own is rounded to 16 bit. Nested ones are integers times a 16-bit float:
that is chosen so that the one of greatest magnitude gets the greatest integer; but if there is one with which all
scales come out exactly, it is taken, so that scales that were stored before stay what they are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from streamconv.kernels.ggml.packing import codes_of
from streamconv.kernels.ggml.types import BlockType

LARGEST_HALF = 65504.0
# Multiples that a device tries together, of so many super-blocks: those of one cell.
_AT_ONCE = 8
_STRETCH = 1 << 15


class Nested(Protocol):
    """Search for the 16-bit float of each super-block."""

    def __call__(self, wished: Tensor, limit: int, is_signed: bool) -> tuple[Tensor, Tensor]:
        """Factors [n] and integers, int16 [n, blocks], for wished numbers [n, blocks], which are finite."""


def to_half(numbers: Tensor) -> Tensor:
    """Numbers rounded to 16-bit floats, half to even, and never to infinity."""
    return numbers.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def split(kind: BlockType, scales: Tensor, nested: Nested) -> tuple[Tensor, Tensor]:
    """Split scales [n * blocks] or [n * blocks, 2] into what is stored.

    Returns 16-bit floats, as float32 [n, 1 or 2], and their integers, int16 [n, blocks, 1 or 2]: 1, if not nested.
    """
    codes = codes_of(kind)
    wished = scales.reshape(-1, kind.blocks, 2 if codes.has_offset else 1)
    if not codes.is_nested:
        return to_half(wished[:, 0]), torch.ones_like(wished, dtype=torch.int16)
    if not codes.has_offset:
        factor, integers = nested(wished[..., 0], codes.scale_limit, True)
        return factor.unsqueeze(-1), integers.unsqueeze(-1)
    parts = [nested(part, codes.scale_limit, False) for part in (wished[..., 0], -wished[..., 1])]
    factors, integers = (torch.stack(each, dim=-1) for each in zip(*parts, strict=True))
    return factors, integers


def joined(kind: BlockType, factors: Tensor, integers: Tensor) -> Tensor:
    """Scales as a loader has them, from what `split` gives: [n * blocks], or [n * blocks, 2] with offsets."""
    codes = codes_of(kind)
    scales = factors.unsqueeze(1) * integers.float()
    if not codes.has_offset:
        return scales.reshape(-1)
    if codes.is_nested:
        scales[..., 1].neg_()
    return scales.reshape(-1, 2)


def _multiples(limit: int, is_signed: bool) -> list[int]:
    """Integers that the scale of greatest magnitude may have, the one that is used for any scales first."""
    if not is_signed:
        return list(range(limit, 0, -1))
    return [multiple for size in range(limit, 0, -1) for multiple in (-size, size) if multiple < limit]


def nested_in_torch(wished: Tensor, limit: int, is_signed: bool) -> tuple[Tensor, Tensor]:
    """See Nested."""
    if not wished.is_cpu:
        return nested_by_masks(wished, limit, is_signed)
    extreme, (lowest, highest) = _extreme(wished), _limits(limit, is_signed)
    first, *multiples = _multiples(limit, is_signed)
    factor, integers = _quotients(wished, to_half(extreme / first), lowest, highest)
    is_open = ~_is_exact(wished, factor, integers)
    for multiple in multiples:
        if not is_open.any():
            break
        trial = to_half(extreme / multiple)
        # Few pass this, so that what follows is done for few.
        rows = (is_open & (trial * multiple == extreme)).nonzero()[:, 0]
        if not len(rows):
            continue
        _, found = _quotients(wished[rows], trial[rows], lowest, highest)
        rows, found = (each[_is_exact(wished[rows], trial[rows], found)] for each in (rows, found))
        factor[rows], integers[rows] = trial[rows], found
        is_open[rows] = False
    return factor, integers


def nested_by_masks(wished: Tensor, limit: int, is_signed: bool) -> tuple[Tensor, Tensor]:
    """See Nested; several are tried for all at once, because a device would have to be waited for to tell for which."""
    found = [_by_masks(some, limit, is_signed) for some in torch.split(wished, _STRETCH)]
    factors, integers = zip(*found, strict=True)
    return torch.cat(factors), torch.cat(integers)


def _by_masks(wished: Tensor, limit: int, is_signed: bool) -> tuple[Tensor, Tensor]:
    extreme, (lowest, highest) = _extreme(wished), _limits(limit, is_signed)
    multiples = _multiples_on(limit, is_signed, wished.device)
    factor, integers = _quotients(wished, to_half(extreme / multiples[0]), lowest, highest)
    is_open = ~_is_exact(wished, factor, integers)
    for some in torch.split(multiples[1:], _AT_ONCE):
        trials = to_half(extreme / some[:, None])
        _, tried = _quotients(
            wished.expand(len(some), *wished.shape).flatten(0, 1), trials.flatten(), lowest, highest
        )
        tried = tried.view(len(some), *wished.shape)
        fits = (trials * some[:, None] == extreme) & _is_exact(wished, trials, tried)
        numbers = torch.arange(len(some), device=wished.device)[:, None]
        first = torch.where(fits, numbers, len(some) - 1).amin(0)[None]
        is_found = is_open & fits.any(0)
        factor = torch.where(is_found, trials.gather(0, first)[0], factor)
        chosen = tried.gather(0, first[..., None].expand(1, *wished.shape))[0]
        integers = torch.where(is_found[:, None], chosen, integers)
        is_open &= ~is_found
    return factor, integers


def _multiples_on(limit: int, is_signed: bool, device: torch.device) -> Tensor:
    """Those of `_multiples`, float32, made on the device."""
    sizes = torch.arange(limit, 0, -1, dtype=torch.float32, device=device)
    if not is_signed:
        return sizes
    both = torch.stack((-sizes, sizes), dim=1).view(-1)
    return torch.cat((both[:1], both[2:]))


def _extreme(wished: Tensor) -> Tensor:
    """Scale of greatest magnitude of every super-block."""
    return wished.gather(1, wished.abs().argmax(1, keepdim=True))[:, 0]


def _limits(limit: int, is_signed: bool) -> tuple[int, int]:
    return (-limit, limit - 1) if is_signed else (0, limit)


def _quotients(wished: Tensor, factor: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    divisor = torch.where(factor == 0, 1, factor).unsqueeze(1)
    integers = (wished / divisor).round().clamp(lowest, highest).to(torch.int16)
    return factor, torch.where(factor.unsqueeze(1) == 0, 0, integers)


def _is_exact(wished: Tensor, factor: Tensor, integers: Tensor) -> Tensor:
    return (factor.unsqueeze(-1) * integers.float() == wished).all(-1)
