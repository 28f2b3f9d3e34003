"""Codes of a few bits each, one after the other in a stream of bytes, the lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.kernels import kernels_for


def unpacked_bits(raw: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (uint8, flat) in `raw` (uint8, flat); of other than 4 and 8 bits, a multiple of eight."""
    if bits == 8:
        return raw[:count]
    if bits == 4:
        codes = torch.empty(count, dtype=torch.uint8, device=raw.device)
        kernels_for(raw.device).unpack_pairs(raw, codes, low_first=True)
        return codes
    codes = torch.empty(count, dtype=torch.uint8, device=raw.device)
    kernels_for(raw.device).unpack_bits(raw[: count * bits // 8], bits, codes)
    return codes


def packed_bits(codes: Tensor, bits: int, out: Tensor) -> None:
    """Write `codes` (uint8, flat) to `out` (uint8, flat), as many as in `unpacked_bits`."""
    if bits == 8:
        out.copy_(codes)
    elif bits == 4:
        kernels_for(codes.device).pack_pairs(codes, out, low_first=True)
    else:
        kernels_for(codes.device).pack_bits(codes, bits, out)
