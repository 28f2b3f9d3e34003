"""What is tried of an architecture, and how a try is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools import architectures
from tools.architecture_adapters import make
from tools.architecture_models import LIVE_DIFFERS
from tools.architectures import ENVIRONMENTS, Differences, attempt, forms_of, record, tried_in, verdict

CURRENT = ENVIRONMENTS[0]
# One of each kind that is not tried elsewhere in this suite.
FAST = ["kimi_linear", "minimax_m2", "nllb-moe", "mimo_v2_flash"]


@pytest.mark.parametrize("name", FAST)
def test_an_architecture_is_right(name: str, tmp_path: Path) -> None:
    make(tmp_path / name, name, ["all-linear"])
    outcome = attempt((tmp_path, name, CURRENT.name, "all-linear"))
    assert outcome.outcome == "right", outcome


@pytest.mark.parametrize(
    ("name", "found", "outcome"),
    [
        ("llama", Differences(1e-6, 0, 0, 0), "right"),
        ("llama", Differences(1e-4, 0, 0, 0), "wrong"),
        ("llama", Differences(1e-4, 0, 0, 1e-4), "merge"),
        ("llama", Differences(1e-6, 1e-4, 0, 0), "wrong"),
        ("jamba", Differences(1e-2, 0, 0, 0), "merge"),
        ("jamba", Differences(1e-2, 1e-4, 0, 0), "wrong"),
        ("llama", Differences(1e-6, math.nan, 0, 0), "wrong"),
        ("llama", Differences(math.nan, 0, 0, 0), "wrong"),
    ],
)
def test_a_verdict_needs_every_figure(name: str, found: Differences, outcome: str) -> None:
    assert verdict(name, found)[0] == outcome
    assert "llama" not in LIVE_DIFFERS


def test_a_merge_that_is_not_that_of_peft_is_wrong(tmp_path: Path) -> None:
    make(tmp_path / "llama", "llama", ["usual"])
    path = tmp_path / "llama" / "usual" / "merged" / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "down_proj" in key)
    save_file(tensors | {name: tensors[name] + 0.01 * torch.ones(())}, path, {"format": "pt"})
    assert attempt((tmp_path, "llama", CURRENT.name, "usual")).outcome == "wrong"


def test_older_versions_try_architectures_with_experts() -> None:
    assert tried_in(ENVIRONMENTS[1], ["llama", "mixtral"]) == ["mixtral"]
    assert tried_in(CURRENT, ["llama", "mixtral"]) == ["llama", "mixtral"]
    assert list(forms_of("llama", CURRENT)) == ["usual", "all-linear"]
    assert list(forms_of("mixtral", CURRENT)) == ["usual", "all-linear", "parameters"]


def test_tries_of_some_take_the_place_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(architecture: str, outcome: str) -> dict[str, str]:
        return {"architecture": architecture, "environment": CURRENT.name, "outcome": outcome}

    monkeypatch.setattr(architectures, "TARGET", tmp_path / "architectures.json")
    record({"outcomes": [tried("llama", "wrong"), tried("mixtral", "right")]}, [])
    record({"outcomes": [tried("llama", "right")]}, ["llama"])
    outcomes = json.loads((tmp_path / "architectures.json").read_text())["outcomes"]
    assert outcomes == [tried("llama", "right"), tried("mixtral", "right")]
