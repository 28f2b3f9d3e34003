"""Types of ggml, which GGUF files store: their tables, decoding, and encoding in steps that any rounding can use.

The seam is `block_kernels_for`, as `kernels_for` is that of the grids.
"""

from __future__ import annotations

import functools

import torch

from streamconv.kernels.ggml.base import BlockKernels
from streamconv.kernels.ggml.in_torch import TorchBlockKernels
from streamconv.kernels.ggml.types import BLOCK_TYPES, BY_NUMBER, BlockType, Codes

__all__ = [
    "BLOCK_TYPES",
    "BY_NUMBER",
    "TORCH_BLOCKS",
    "BlockKernels",
    "BlockType",
    "Codes",
    "block_kernels_for",
    "compiled_block_kernels",
]

TORCH_BLOCKS = TorchBlockKernels()


def block_kernels_for(device: torch.device) -> BlockKernels:
    """Kernels for `device`: compiled loops on a CPU where numba can be had, torch otherwise."""
    compiled = compiled_block_kernels() if device.type == "cpu" else None
    return TORCH_BLOCKS if compiled is None else compiled


@functools.cache
def compiled_block_kernels() -> BlockKernels | None:
    """The compiled loops; None where numba is missing, does not know this platform, or is told not to compile."""
    try:
        from streamconv.kernels.ggml.compiled import load
    except (ImportError, OSError):  # OSError: LLVM's library is there but does not load
        return None
    return load()
