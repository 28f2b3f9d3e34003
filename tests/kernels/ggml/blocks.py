"""Super-blocks for tests: ggml's own, random ones, and both implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from streamconv.kernels.ggml import BLOCK_TYPES, TORCH_BLOCKS, BlockKernels, BlockType, compiled_block_kernels

GOLDEN = Path(__file__).parents[2] / "golden" / "ggml"
WRITTEN = [name for name, kind in BLOCK_TYPES.items() if kind.codes is not None]

every_written = pytest.mark.parametrize("name", WRITTEN)
both_kernels = pytest.mark.parametrize("where", ["torch", "compiled"])


def kernels(where: str) -> BlockKernels:
    if where == "torch":
        return TORCH_BLOCKS
    pytest.importorskip("numba")
    found = compiled_block_kernels()
    assert found is not None
    return found


def golden() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(GOLDEN / "blocks.safetensors")
    return tensors


def golden_weights() -> Tensor:
    return golden()["weights"].float()


def golden_blocks(name: str) -> Tensor:
    """ggml's own super-blocks of the golden weights, [n, bytes]."""
    return golden()[name].reshape(-1, BLOCK_TYPES[name].bytes)


def in_super_blocks(kind: BlockType, values: Tensor) -> Tensor:
    return values.reshape(-1, kind.super_block)


def random_blocks(kind: BlockType, count: int, seed: int = 0) -> Tensor:
    """Any bytes at all: scales are any number, infinity and NaN among them."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, kind.bytes), np.uint8)
    return torch.from_numpy(drawn)


def decoded(where: str, kind: BlockType, raw: Tensor) -> Tensor:
    out = torch.empty(raw.shape[0], kind.super_block)
    kernels(where).decode(kind, raw, out)
    return out


def unpacked(where: str, kind: BlockType, raw: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(raw.shape[0], kind.super_block, dtype=torch.uint8)
    return codes, kernels(where).unpack(kind, raw, codes)


def packed(where: str, kind: BlockType, codes: Tensor, scales: Tensor) -> Tensor:
    raw = torch.zeros(codes.shape[0], kind.bytes, dtype=torch.uint8)
    kernels(where).pack(kind, codes, scales, raw)
    return raw


def nearest(where: str, kind: BlockType, values: Tensor, scales: Tensor) -> Tensor:
    codes = torch.empty(values.shape, dtype=torch.uint8)
    kernels(where).nearest(kind, values, scales, codes)
    return codes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """-0 is not 0; all NaN are one."""
    is_nan = one.isnan()
    same = one.view(torch.int32) == other.view(torch.int32)
    return torch.equal(is_nan, other.isnan()) and bool((same | is_nan).all())
