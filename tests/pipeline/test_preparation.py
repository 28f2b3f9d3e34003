"""Jobs that are planned for a GPU, or for what is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streamconv
from streamconv.errors import ResourceError
from streamconv.pipeline import Job, prepare
from streamconv.pipeline.shown import plan_as_text
from streamconv.planning.options import MergeOptions
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=128, layers=1, vocabulary=96)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes free on the one GPU there is, under `bytes`."""
    found = {"bytes": 2**40}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (found["bytes"], 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda name: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda name: 0)
    return found


def test_a_plan_that_does_not_fit_the_free_memory_of_a_gpu(tmp_path: Path, free: dict[str, int]) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes)
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, rank=4)

    def job(device: str) -> Job:
        return Job(str(base), str(adapter), MergeOptions(quant="nf4"), device)

    planned = prepare(job("auto")).plan
    assert planned.device.name == "cuda:0"
    assert planned.peak_vram > 0
    free["bytes"] = planned.peak_vram
    left = prepare(job("auto"))
    assert left.plan.device.is_cpu
    assert left.plan.fingerprint == prepare(job("cpu")).plan.fingerprint
    assert left.plan.memory == prepare(job("cpu")).plan.memory
    assert "on cpu; cuda:0 (H100) has " in plan_as_text(left)
    with pytest.raises(
        ResourceError, match=r"--device cuda was asked for, but cuda:0 .* free, and .* planned"
    ):
        prepare(job("cuda"))


def test_every_run_computes_exactly_and_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    base = str(write_base(tmp_path / "base", SIZES.shapes))
    adapter = str(write_adapter(tmp_path / "adapter", SIZES.shapes, rank=4))
    out, seen = str(tmp_path / "out"), set[str]()

    def look(done: int, total: int) -> None:
        del total
        if done:
            seen.add(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")
    try:
        streamconv.merge(base, adapter, out, device="cpu", on_progress=look)
        streamconv.analyze(base, adapter, formats=["nf4"], device="cpu", on_progress=look)
        assert seen == {"highest"}
        seen.clear()
        streamconv.extract(base, out, str(tmp_path / "extracted"), device="cpu", on_progress=look)
        assert seen == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
