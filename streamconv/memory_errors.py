"""Memory of an accelerator that ran out, by whatever class the libraries say so.

Sources: torch `c10/cuda/CUDAException.cpp` (AcceleratorError), `aten/src/ATen/cuda/Exceptions.h` (texts of cuBLAS,
cuSOLVER, cuSPARSE), Triton `third_party/nvidia/backend/driver.c`.
"""

from __future__ import annotations

import re

import torch

from streamconv.errors import ResourceError
from streamconv.system_errors import first_line

# Pinned memory, streams and modules that are loaded late are not torch's allocator's, and its class is not raised.
_REFUSED = re.compile(
    r"\b(?:CUDA|HIP)\b.*\bout of memory\b|\b[A-Z]+_STATUS_(?:\w+_)?ALLOC(?:ATION)?_FAILED\b", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an accelerator, or its driver for pinned memory, has not got the memory asked for.

    One that a CPU's allocator raises does not; neither does a fault of the device, after which nothing of it works.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _REFUSED.search(first_line(error)) is not None


def ran_out(device: str, error: BaseException, remedy: str) -> ResourceError:
    """The ResourceError that tells of `error`, by which `device` ran out of memory; `remedy` is a whole sentence."""
    told = ResourceError(f"{device} ran out of memory: {first_line(error).rstrip('. ')}. {remedy}")
    told.__cause__ = error
    return told
