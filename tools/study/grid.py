"""nf4 as bitsandbytes stores it, read back without streamconv: codes, effective scales, steps of the grid.

The *step* of an entry is the mean of the two gaps between its code's value and the neighbouring ones (at an end of
the grid the one gap), times the scale of its block. The *delta-to-step ratio* of a weight is mean |D| / mean step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

BLOCK = 64
VALUES: Tensor = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
_GAPS = VALUES[1:] - VALUES[:-1]
STEPS = torch.cat((_GAPS[:1], (_GAPS[1:] + _GAPS[:-1]) / 2, _GAPS[-1:]))
_MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / 2


@dataclass(frozen=True, slots=True)
class OnGrid:
    """A weight in nf4: codes uint8 and values float32 [out, in], scales float32 of every element [out, in]."""

    codes: Tensor
    scales: Tensor
    values: Tensor

    @property
    def steps(self) -> Tensor:
        return STEPS[self.codes.long()] * self.scales


def quantize(weight: Tensor) -> OnGrid:
    """nf4 with double-quantized scales by bitsandbytes: nearest rounding, scales are the blocks' maxima."""
    return unpack(
        *bitsandbytes.functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
    )


def unpack(packed: Tensor, state: Any) -> OnGrid:
    """What bitsandbytes has packed, whose state says the shape."""
    nested = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = packed.flatten()
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()[: state.shape.numel()]
    scales = nested.float().repeat_interleave(BLOCK)[: codes.numel()]
    values = VALUES[codes.long()] * scales
    return OnGrid(codes.view(state.shape), scales.view(state.shape), values.view(state.shape))


def nearest_codes(target: Tensor, scales: Tensor) -> Tensor:
    """Codes of `target` on a grid whose `scales` (one an element) are already fixed."""
    return torch.bucketize(target / scales, _MIDPOINTS).to(torch.uint8)


def is_clamped(target: Tensor, scales: Tensor) -> Tensor:
    """Where `target` lies beyond the ends of the grid."""
    return target.abs() > scales


def ratio(delta: Tensor, base: OnGrid) -> float:
    """The delta-to-step ratio of `delta` on `base`."""
    return (delta.abs().mean() / base.steps.mean()).item()


def kept(result: Tensor, base: Tensor, delta: Tensor) -> float:
    """Share of `delta` that `result` keeps of it: <result - base, delta> / ||delta||^2, in float64."""
    change, direction = (result - base).double(), delta.double()
    return ((change * direction).sum() / (direction * direction).sum()).item()
