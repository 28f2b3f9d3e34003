"""The kernels of ggml's types as torch operations, for any device: what the compiled ones must equal bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.kernels.ggml.decoding import decode_super_blocks
from streamconv.kernels.ggml.fitting import TorchSearches, fit, ranges_in_torch, starting_scales
from streamconv.kernels.ggml.packing import codes_of, pack_codes, pack_scales, unpack_codes, unpack_scales
from streamconv.kernels.ggml.scales import joined, nested_in_torch, split
from streamconv.kernels.ggml.types import BlockType


@dataclass(frozen=True, slots=True)
class TorchBlockKernels:
    """See BlockKernels."""

    name: str = "torch"

    def decode(self, kind: BlockType, raw: Tensor, out: Tensor) -> None:
        out.copy_(decode_super_blocks(kind, raw))

    def unpack(self, kind: BlockType, raw: Tensor, codes: Tensor) -> Tensor:
        codes.copy_(unpack_codes(kind, raw))
        return unpack_scales(kind, raw)

    def pack(self, kind: BlockType, codes: Tensor, scales: Tensor, raw: Tensor) -> None:
        pack_scales(kind, *split(kind, scales, nested_in_torch), raw)
        self.pack_codes(kind, codes, raw)

    def pack_codes(self, kind: BlockType, codes: Tensor, raw: Tensor) -> None:
        pack_codes(kind, codes, raw)

    def stored(self, kind: BlockType, scales: Tensor) -> Tensor:
        return joined(kind, *split(kind, scales, nested_in_torch))

    def nearest(self, kind: BlockType, values: Tensor, scales: Tensor, codes: Tensor) -> None:
        known = codes_of(kind)
        blocks = values.reshape(-1, kind.block)
        scale = scales[:, :1] if known.has_offset else scales.unsqueeze(1)
        less = blocks - scales[:, 1:] if known.has_offset else blocks
        found = (less * torch.where(scale == 0, 0, 1 / scale)).round().clamp_(known.lowest, known.highest)
        codes.copy_(found.to(torch.int8).view(torch.uint8).reshape(codes.shape))

    def starting_scales(self, kind: BlockType, values: Tensor) -> Tensor:
        return self.stored(kind, starting_scales(kind, values, ranges_in_torch))

    def fit(self, kind: BlockType, values: Tensor, weights: Tensor | None) -> Tensor:
        return fit(kind, values, weights, TorchSearches(), nested_in_torch)
