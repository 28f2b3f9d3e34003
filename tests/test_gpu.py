"""The same merge on CUDA and on the CPU: one seam, one maths. Run with `pytest -m gpu` where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import streamconv
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    base = tiny.save_base(folder / "base", tiny.llama_config(), dtype=torch.bfloat16)
    adapter = tiny.save_adapter(folder / "adapter", base, LoraConfig(r=4, target_modules="all-linear"))
    return base, adapter.path


def _merge(inputs: tuple[Path, Path], out: Path, device: str, *, quant: str, merge_base: str) -> Path:
    base, adapter = map(str, inputs)
    streamconv.merge(base, adapter, str(out), quant=quant, merge_base=merge_base, device=device)
    return out


def test_bf16_differs_by_one_ulp_at_most(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Products of A and B are summed in another order, so a value at the border of two roundings may move."""
    on_cpu = _merge(inputs, tmp_path / "cpu", "cpu", quant="none", merge_base="original")
    on_gpu = _merge(inputs, tmp_path / "gpu", "cuda", quant="none", merge_base="original")
    expected = tiny.read_tensors(on_cpu / "model.safetensors")
    found = tiny.read_tensors(on_gpu / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        steps = (found[name].view(torch.int16).int() - tensor.view(torch.int16).int()).abs()
        assert steps.max() <= 1, name
        assert (steps != 0).float().mean() < 1e-3, name


@pytest.mark.parametrize("merge_base", ["original", "nf4-dq"])
def test_nf4_codes_agree_but_for_borders(inputs: tuple[Path, Path], tmp_path: Path, merge_base: str) -> None:
    on_cpu = _merge(inputs, tmp_path / "cpu", "cpu", quant="nf4-dq", merge_base=merge_base)
    on_gpu = _merge(inputs, tmp_path / "gpu", "cuda", quant="nf4-dq", merge_base=merge_base)
    expected = tiny.read_tensors(on_cpu / "model.safetensors")
    found = tiny.read_tensors(on_gpu / "model.safetensors")
    for name, tensor in expected.items():
        if tensor.dtype == torch.uint8 and name.endswith("weight"):
            assert (found[name] != tensor).float().mean() < 1e-3, name


def test_a_full_verification_on_the_gpu_finds_its_own_output_equal(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = _merge(inputs, tmp_path / "out", "cuda", quant="nf4-dq", merge_base="nf4-dq")
    base, adapter = map(str, inputs)
    assert streamconv.verify(str(out), full=True, base=base, adapter=adapter, device="cuda").exact
