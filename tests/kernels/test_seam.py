"""Which kernels run, and that a merge gives the same files and numbers with either."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from streamconv import kernels
from streamconv.kernels import TORCH, compiled_kernels, kernels_for
from streamconv.pipeline import convert, merge
from tests.models import Sizes, write_adapter, write_base

CPU = torch.device("cpu")
# Rows of odd length wrap blocks; the last block of every weight is short.
SIZES = Sizes(hidden=70, inner=132, layers=1, vocabulary=50)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Have the kernels looked for anew, now and afterwards."""
    compiled_kernels()  # its loops stay imported: read first where numba is told not to compile, they would never be
    known = sys.modules.pop("streamconv.kernels.compiled", None)
    compiled_kernels.cache_clear()
    yield
    sys.modules.pop("streamconv.kernels.compiled", None)
    if known is not None:
        sys.modules["streamconv.kernels.compiled"] = known
    compiled_kernels.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_numba_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kernels_for(CPU) is TORCH


@pytest.mark.usefixtures("fresh")
def test_where_llvm_does_not_load_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """A finder of modules that meets LLVM's library where the compiled loops are looked for."""

        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "streamconv.kernels.compiled":
                raise OSError("libLLVM.so: undefined symbol")

    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    assert kernels_for(CPU) is TORCH


@pytest.mark.usefixtures("fresh")
def test_where_numba_is_told_not_to_compile_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert kernels_for(CPU) is TORCH


def test_a_gpu_computes_with_torch() -> None:
    assert kernels_for(torch.device("cuda:0")) is TORCH


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("seam")
    adapter = write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "down_proj"), size=0.004)
    return Inputs(write_base(folder / "base", SIZES.shapes, shards=1), adapter)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "search"])
@pytest.mark.parametrize(
    ("stored", "quant", "merge_base"),
    [
        (None, "nf4", "original"),
        (None, "fp4-dq", "original"),
        (None, "int8", "original"),
        (None, "nf4-dq", "nf4-dq"),
        (None, "int8", "int8"),
        ("nf4-dq", "keep", "original"),
        ("fp4", "keep", "original"),
        ("int8", "keep", "original"),
        ("nf4", "int8", "original"),
    ],
)
def test_a_merge_is_the_same(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounding: str,
    stored: str | None,
    quant: str,
    merge_base: str,
) -> None:
    pytest.importorskip("numba")
    base = inputs.base
    if stored is not None:
        convert(inputs.base, tmp_path / "base", quant=stored)
        base = tmp_path / "base"
    found = []
    for name in ("compiled", "torch"):
        if name == "torch":
            monkeypatch.setattr(kernels, "compiled_kernels", lambda: None)
        assert kernels_for(CPU).name == name
        out = tmp_path / "out" / name
        report = merge(base, inputs.adapter, out, quant=quant, rounding=rounding, merge_base=merge_base)
        assert report.kept_delta is not None
        found.append(files(out))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == set()
