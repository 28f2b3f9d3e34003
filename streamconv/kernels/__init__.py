"""Kernels: the loops over a cell's elements, compiled where that is possible and in torch everywhere else.

Both implementations give the same bytes, so which one runs is a matter of speed alone. The seam is `kernels_for`.
"""

from __future__ import annotations

import functools

import torch

from streamconv.kernels.base import SEARCH_FACTORS, Kernels, Start, pairwise_sum
from streamconv.kernels.in_torch import TorchKernels

__all__ = ["SEARCH_FACTORS", "TORCH", "Kernels", "Start", "compiled_kernels", "kernels_for", "pairwise_sum"]

TORCH = TorchKernels()


def kernels_for(device: torch.device) -> Kernels:
    """Kernels for `device`: compiled loops on a CPU where numba can be had, torch otherwise."""
    compiled = compiled_kernels() if device.type == "cpu" else None
    return TORCH if compiled is None else compiled


@functools.cache
def compiled_kernels() -> Kernels | None:
    """The compiled loops; None where numba is missing, does not know this platform, or is told not to compile.

    numba's own switch for that is the environment variable NUMBA_DISABLE_JIT=1.
    """
    try:
        from streamconv.kernels.compiled import load
    except (ImportError, OSError):  # OSError: LLVM's library is there but does not load
        return None
    return load()
