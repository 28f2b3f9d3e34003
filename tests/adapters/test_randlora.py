"""RandLoRA: against PEFT, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import RandLoraConfig

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, read_for, save_by_hand
from tests.adapters.trials import check_fields, held, merge_on_other_bases, refuse
from tests.parity.opening import tensors
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj.randlora_"
SHARED = ["base_model.randlora_A", "base_model.randlora_B"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("randlora") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "randlora_alpha": 2, "target_modules": "all-linear"},
        {"r": 5, "randlora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]},
        {"r": 4, "randlora_alpha": 2, "target_modules": ["up_proj"], "sparse": True},
        {"r": 4, "randlora_alpha": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["all linear", "uneven", "sparse", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, RandLoraConfig(**options))


def test_conv1d_is_pefts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    targets = ["c_attn", "c_proj", "c_fc"]
    config = RandLoraConfig(r=6, randlora_alpha=2, target_modules=targets, fan_in_fan_out=True)
    merge_as_peft(tmp_path, base, config, quantizes=False)


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(
        tmp_path, base, RandLoraConfig(r=4, randlora_alpha=2, target_modules=["q_proj", "up_proj"])
    )


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, RandLoraConfig(r=4, target_modules=["q_proj"])).path


def copies(adapter: Path) -> list[str]:
    return [
        name
        for name in read_tensors(adapter / TENSORS)
        if name.endswith(("proj.randlora_A", "proj.randlora_B"))
    ]


def test_projections_may_be_saved_once_or_under_layers_alone(base: Path, adapter: Path) -> None:
    """PEFT saves them everywhere, and did not always."""
    streamconv.merge(base, adapter, adapter.parent / "expected")
    expected, stored = tensors(adapter.parent / "expected"), read_tensors(adapter / TENSORS)
    assert len(copies(adapter)) == 4
    for without in (copies(adapter), SHARED):
        edit_tensors(adapter / TENSORS, put=stored)
        edit_tensors(adapter / TENSORS, drop=without)
        out = adapter.parent / f"without-{len(without)}"
        streamconv.merge(base, adapter, out)
        found = tensors(out)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_projections_that_were_not_saved_are_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, save_projection=False)
    edit_tensors(adapter / TENSORS, drop=[*SHARED, *copies(adapter)])
    refuse(base, adapter, UnsupportedError, "projections were not saved .*bfloat16")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    stored = read_tensors(adapter / TENSORS)
    for name, shape in (
        (f"{Q}lambda", (4, 7)),
        (f"{Q}gamma", (8, 31)),
        (SHARED[0], (4, 1, 31)),
        (SHARED[0], (4, 32)),
        (SHARED[1], (31, 8, 4)),
        (SHARED[1], (32, 7, 4)),
    ):
        edit_tensors(adapter / TENSORS, put={name: torch.ones(shape)})
        refuse(base, adapter, AdapterError, f"{name} has shape .*trained on this base")
        edit_tensors(adapter / TENSORS, put=stored)
    edit_json(adapter / CONFIG, r=5)
    refuse(base, adapter, AdapterError, "by r = 5")


@pytest.mark.parametrize("role", ["lambda", "gamma"])
def test_a_missing_tensor_is_refused(base: Path, adapter: Path, role: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q + role])
    refuse(base, adapter, AdapterError, f"q_proj.randlora_{role} is missing")


def test_every_tensor_counts(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={f"{Q}other": torch.ones(4)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, RandLoraConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, bias="some")
    refuse(base, adapter, UnsupportedError, "bias is")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {f"{Q}lambda".replace(".0.", f".{layer}."): torch.zeros(4, 8) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, "every update is zero")


@pytest.mark.parametrize("wider", [0, 5])
def test_what_is_held_is_counted(tmp_path: Path, wider: int) -> None:
    config = {"peft_type": "RANDLORA", "r": 8, "randlora_alpha": 2, "target_modules": ["layer"]}
    stored = {
        f"{Q}lambda".replace("model.layers.0.self_attn.q_proj", "layer"): torch.ones(8, 50),
        f"{Q}gamma".replace("model.layers.0.self_attn.q_proj", "layer"): torch.ones(50, 400),
        SHARED[0]: torch.ones(8, 1, 400),
        SHARED[1]: torch.ones(700, 50 + wider, 8),
    }
    folder = save_by_hand(tmp_path / "a", config, {"x": torch.ones(1)})
    edit_tensors(folder / TENSORS, put=stored, drop=["base_model.model.x"])
    ((update, peak),) = held(read_for(folder, {"layer.weight": (600, 400)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["alpha"]) == ("RANDLORA", 4, 640)
