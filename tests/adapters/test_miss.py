"""MiSS, and Bone, its older name: against PEFT, all three arrangements, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.parity.opening import tensors
from tests.tiny import edit_json, edit_tensors, llama_config, read_tensors, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("miss") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 7, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"], "init_weights": False},
        {"r": 5, "target_modules": ["q_proj", "up_proj"], "init_weights": "mini", "mini_r": 8},
        {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], "init_weights": "bat"},
    ],
    ids=["all linear", "a rest", "saved", "mini", "bat"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, MissConfig(**options))


@pytest.mark.parametrize("init", [True, "bat"])
def test_bone_is_the_same_by_its_older_name(tmp_path: Path, base: Path, init: bool | str) -> None:
    config = MissConfig(r=8, target_modules=["q_proj", "down_proj"], init_weights=init)
    adapter = save_adapter(tmp_path / "adapter", base, config).path
    streamconv.merge(base, adapter, tmp_path / "miss")
    names = read_tensors(adapter / TENSORS)
    edit_tensors(adapter / TENSORS, rename={name: name.replace("miss", "bone") for name in names})
    edit_json(adapter / CONFIG, peft_type="BONE", bias="none", peft_version="0.15.2")
    streamconv.merge(base, adapter, tmp_path / "bone")
    one, other = tensors(tmp_path / "miss"), tensors(tmp_path / "bone")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_bat_in_strips_follows_the_formula(tmp_path: Path) -> None:
    """More columns than are multiplied at a time."""
    torch.manual_seed(0)
    blocks, weight = torch.randn(7, 10, 10), torch.randn(70, 9000)
    config = {"peft_type": "MISS", "r": 10, "init_weights": "bat", "target_modules": ["layer"]}
    folder = save_by_hand(tmp_path / "a", config, {"layer.miss_block": blocks})
    found = merged_by_hand(read_for(folder, {"layer.weight": (70, 9000)}), {"layer.weight": weight})
    own = weight.double().reshape(7, 10, 900, 10)
    expected = own + torch.einsum("aqbt,ats->aqbs", own, blocks.double()) + blocks.double()[:, :, None]
    torch.testing.assert_close(
        found["layer.weight"], expected.reshape(70, 9000).float(), rtol=1e-5, atol=1e-5
    )


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    config = MissConfig(r=4, target_modules=["q_proj", "down_proj"])
    return save_adapter(tmp_path / "adapter", base, config).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(4, 31), (5, 32), (32,), (8, 4, 4), (4, 8)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "miss_block has shape .* does not fit .*trained on this base")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"init_weights": "bat"}, "has shape .*, as r, mini_r and init_weights"),
        ({"init_weights": "mini", "mini_r": 8}, "has shape .*, as r, mini_r and init_weights"),
        ({"init_weights": "mini", "mini_r": None}, "mini_r must be"),
        ({"r": 5}, "has shape .*, as r, mini_r and init_weights"),
    ],
    ids=str,
)
def test_another_config_is_refused(base: Path, adapter: Path, fields: dict[str, Any], match: str) -> None:
    edit_json(adapter / CONFIG, **fields)
    refuse(base, adapter, AdapterError, match)


def test_another_arrangement_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, init_weights="olora")
    refuse(base, adapter, UnsupportedError, "an arrangement of the trained numbers that is not known here")


@pytest.mark.parametrize("key", ["miss_r", "miss_block.weight", "lora_A.weight"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("miss_block", key): torch.ones(4, 32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


@pytest.mark.parametrize("field", ["rank_pattern", "lora_alpha", "layer_replication"])
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]]})
    refuse(base, adapter, UnsupportedError, f"the field '{field}'")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {name: torch.zeros_like(block) for name, block in read_tensors(adapter / TENSORS).items()}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, r"every update is zero \(all miss_block\)")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(MissConfig)} <= set(ADAPTERS["MISS"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["variant"]) == ("MISS", 4, "plain")
