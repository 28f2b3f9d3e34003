"""Codes of a few bits each, one after the other in a stream of bytes, the lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.kernels import kernels_for

# Codes, and bytes that hold them, after which the pattern begins anew.
_PERIODS = {2: (4, 1), 3: (8, 3), 5: (8, 5), 6: (4, 3)}


def unpacked_bits(raw: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (uint8, flat) in `raw` (uint8, flat)."""
    if bits == 8:
        return raw[:count]
    if bits == 4:
        codes = torch.empty(count, dtype=torch.uint8, device=raw.device)
        kernels_for(raw.device).unpack_pairs(raw, codes, low_first=True)
        return codes
    length, size = _PERIODS[bits]
    words = torch.zeros(raw.numel() // size, dtype=torch.int64, device=raw.device)
    for place, column in enumerate(raw.view(-1, size).T):
        words |= column.long() << 8 * place
    shifts = torch.arange(length, device=raw.device) * bits
    found: Tensor = (words[:, None] >> shifts) & (2**bits - 1)
    return found.to(torch.uint8).view(-1)[:count]


def packed_bits(codes: Tensor, bits: int, out: Tensor) -> None:
    """Write `codes` (uint8, flat), as many as fill whole bytes, to `out` (uint8, flat)."""
    if bits == 8:
        out.copy_(codes)
    elif bits == 4:
        kernels_for(codes.device).pack_pairs(codes, out, low_first=True)
    else:
        length, size = _PERIODS[bits]
        words = torch.zeros(codes.numel() // length, dtype=torch.int64, device=codes.device)
        for place, column in enumerate(codes.view(-1, length).T):
            words |= column.long() << bits * place
        for place, byte in enumerate(out.view(-1, size).T):
            byte.copy_((words >> 8 * place & 0xFF).to(torch.uint8))
