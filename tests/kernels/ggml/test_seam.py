"""Which kernels of ggml's types run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from streamconv.kernels.ggml import TORCH_BLOCKS, block_kernels_for, compiled_block_kernels

CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Have the kernels looked for anew, now and afterwards."""
    compiled_block_kernels()
    known = sys.modules.pop("streamconv.kernels.ggml.compiled", None)
    compiled_block_kernels.cache_clear()
    yield
    sys.modules.pop("streamconv.kernels.ggml.compiled", None)
    if known is not None:
        sys.modules["streamconv.kernels.ggml.compiled"] = known
    compiled_block_kernels.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_numba_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert block_kernels_for(CPU) is TORCH_BLOCKS


@pytest.mark.usefixtures("fresh")
def test_where_numba_is_told_not_to_compile_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert block_kernels_for(CPU) is TORCH_BLOCKS


def test_elsewhere_torch_computes() -> None:
    pytest.importorskip("numba")
    assert block_kernels_for(CPU).name == "compiled"
    assert block_kernels_for(torch.device("cuda")) is TORCH_BLOCKS
