"""What every test runs under."""

from __future__ import annotations

import gc
import os

# Before torch reads it: threads that wait for each other's share of a tiny product must not spin, as tests run side by
# side. Processes that tests start do the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.backends.cpu.ops import _has_avx512
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from bitsandbytes.nn import modules
from hypothesis import settings
from torch import Tensor

# How long an example takes says more of the machine than of the code, and most of the first one is compiling.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_LIBRARY: Any = torch.library.Library
_KERNELS = _LIBRARY("bitsandbytes", "IMPL")


def pytest_configure() -> None:
    """Have torch compute in one thread, and bitsandbytes 0.50.2 the same on every processor.

    Models here are so small that a second thread costs more than it gives, and cores are shared by the processes that
    tests are spread over. What must be right in several threads sets their number itself.

    With AVX-512, its kernel that decodes 4-bit weights is wrong where blocks run across row ends: its own
    implementation in torch takes its place. With AVX512-BF16 its layers repack their weights in place at the first
    forward pass, for a kernel of another package, and cut scales to bfloat16: they do not.

    Nothing is brought to the disk, which a merge waits for some twenty times: no test can tell. What is synced, and
    before what, is watched (`checkpoint/test_writer.py`); commands in processes of their own do it.

    Millions of objects that imports and tests themselves are made of stay to the end: no collection goes through them.
    """
    gc.disable()
    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            setattr(os, name, _not_synced)
    torch.set_num_threads(1)
    vars(modules)["has_avx512bf16"] = lambda: False
    if _has_avx512:
        with warnings.catch_warnings(action="ignore"):  # torch tells that a kernel is overridden
            _KERNELS.impl("dequantize_4bit", _decoded, "CPU", allow_override=True)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _not_synced(file: Any) -> None:
    """Fail where the descriptor is not open, as the real one does."""
    os.fstat(file if isinstance(file, int) else file.fileno())


def _decoded(
    codes: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    table = _get_4bit_code(quant_type, codes.device)
    packed = codes.view(torch.uint8).reshape(-1)
    found: Tensor = _dequantize_4bit_compute(packed, absmax.float(), table, blocksize, shape, dtype)
    return found
