"""What makes two runs the same run: whatever can change a byte, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamconv.pipeline import Job, merge_options, prepare
from tests.host_gpu import HostGpu
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json, edit_tensors

SIZES = Sizes(hidden=32, inner=40, layers=1, vocabulary=50)
DEFAULTS: dict[str, Any] = {
    "quant": "keep",
    "dtype": "auto",
    "rounding": "auto",
    "merge_base": "original",
    "seed": 0,
    "min_kept": None,
    "ignore": (),
    "max_ram": "1GiB",
    "max_vram": "2GiB",
    "max_shard_size": None,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", SIZES.shapes, shards=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", SIZES.shapes)


def digest(base: Path, adapter: Path | None, **options: Any) -> str:
    job = Job(
        str(base), None if adapter is None else str(adapter), merge_options(**{**DEFAULTS, **options}), "cpu"
    )
    return prepare(job).plan.digest


def test_every_option_that_changes_bytes_counts(base: Path, adapter: Path) -> None:
    digests = [
        digest(base, adapter),
        digest(base, None),
        digest(base, adapter, dtype="float32"),
        digest(base, adapter, merge_base="nf4"),
        digest(base, adapter, merge_base="nf4-dq"),
        digest(base, adapter, max_shard_size=10_000),
        digest(base, adapter, quant="nf4"),
        digest(base, adapter, quant="nf4", ignore=("up_proj",)),
        digest(base, adapter, quant="nf4", rounding="stochastic"),
        digest(base, adapter, quant="nf4", rounding="stochastic", seed=1),
        digest(base, adapter, quant="nf4", merge_base="nf4"),
        digest(base, adapter, quant="nf4-dq"),
        digest(base, adapter, quant="w4a16", group_size=32),
    ]
    assert len(set(digests)) == len(digests)


def test_budgets_gates_and_spelling_do_not(base: Path, adapter: Path) -> None:
    options: dict[str, Any] = {"quant": "nf4", "merge_base": "nf4-dq", "rounding": "nearest"}
    expected = digest(base, adapter, **options)
    for other in (
        {"max_ram": "300MiB"},
        {"max_vram": "3GiB"},
        {"min_kept": 0.1},
        {"quant": "NF4", "merge_base": "NF4-dq", "rounding": "Nearest"},
    ):
        assert digest(base, adapter, **{**options, **other}) == expected


def test_where_the_inputs_lie_does_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected = digest(base, adapter)
    for folder in (base, adapter):
        shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)  # times are kept
    assert digest(tmp_path / "elsewhere" / "base", tmp_path / "elsewhere" / "adapter") == expected
    os.utime(adapter / "adapter_model.safetensors")  # the adapter is known by its bytes
    assert digest(base, adapter) == expected


def test_every_input_counts(base: Path, adapter: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[0]
    weights = adapter / "adapter_model.safetensors"
    found = [digest(base, adapter)]
    os.utime(shard, ns=(1, 1))  # of so many bytes, the time must do
    found.append(digest(base, adapter))
    name, tensor = next(iter(load_file(weights).items()))
    edit_tensors(weights, put={name: tensor + 1})
    found.append(digest(base, adapter))
    edit_json(adapter / "adapter_config.json", lora_alpha=9)
    found.append(digest(base, adapter))
    edit_json(base / "config.json", model_type="gpt2")  # it may say how a square weight is stored
    found.append(digest(base, adapter))
    assert len(set(found)) == len(found)


def test_precision_of_products_counts_on_a_gpu_alone(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made on a CPU before it was noted is still the same run."""
    job = Job(str(base), str(adapter), merge_options(**DEFAULTS), "auto")
    assert "float32" not in prepare(job).plan.fingerprint
    monkeypatch.setattr("streamconv.pipeline.preparation.resolve_device", lambda name: HostGpu())
    assert prepare(job).plan.fingerprint["float32"] == "ieee"


def test_what_computes_counts(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [digest(base, adapter)]
    monkeypatch.setattr(torch, "__version__", "99.0")
    found.append(digest(base, adapter))
    monkeypatch.setattr("streamconv.planning.fingerprint.version", lambda name: "99.0")
    found.append(digest(base, adapter))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "ABACUS")
    found.append(digest(base, adapter))
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    found.append(digest(base, adapter))
    assert len(set(found)) == len(found)
