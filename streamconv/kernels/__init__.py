"""Kernels: the loops over a cell's elements, compiled where that is possible and in torch everywhere else.

All implementations give the same bytes, so which one runs is a matter of speed alone. The seam is `kernels_for`.
"""

from __future__ import annotations

import functools

import torch

from streamconv.kernels.base import SEARCH_FACTORS, Kernels, Start, pairwise_sum
from streamconv.kernels.in_torch import TorchKernels

__all__ = [
    "SEARCH_FACTORS",
    "TORCH",
    "Kernels",
    "Start",
    "compiled_kernels",
    "fused_kernels",
    "kernels_for",
    "pairwise_sum",
]

TORCH = TorchKernels()


def kernels_for(device: torch.device) -> Kernels:
    """Kernels for `device`: compiled loops on a CPU, and on a CUDA device, where they can be had; torch otherwise."""
    by_type = {"cpu": compiled_kernels, "cuda": fused_kernels}
    found = by_type[device.type]() if device.type in by_type else None
    return TORCH if found is None else found


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


@functools.cache
def fused_kernels() -> Kernels | None:
    """The loops in Triton; None where it is missing, cannot compile, or does not give torch's bytes on this device.

    Triton comes with torch's CUDA wheels for Linux; it asks for a C compiler, too. Triton's own switch, the environment
    variable TRITON_INTERPRET=1, by which it does not compile, has torch take its place.
    """
    try:
        from streamconv.kernels.in_triton import load
    except (ImportError, OSError):  # OSError: its library is there but does not load
        return None
    return load()
