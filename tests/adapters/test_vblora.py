"""VB-LoRA: against PEFT, in both forms, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VBLoRAConfig

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, read_for, save_by_hand
from tests.adapters.trials import check_fields, held, merge_on_other_bases, refuse
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

BANK = "base_model.vblora_vector_bank"
A = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"
OPTIONS: dict[str, Any] = {"num_vectors": 20, "vector_length": 8, "r": 4, "topk": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("vblora") / "base", llama_config())


@pytest.mark.parametrize("saved", [False, True], ids=["logits", "chosen"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head", "down_proj"], "topk": 1, "r": 3, "init_logits_std": 2.0},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "num_vectors": 300, "topk": 2},
    ],
    ids=["all linear", "one", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any], saved: bool) -> None:
    if saved and options.get("topk") == 1:
        pytest.skip("PEFT cannot save the empty rest of the weights")
    config = VBLoRAConfig(**OPTIONS | options, save_only_topk_weights=saved)
    adapter = merge_as_peft(tmp_path, base, config, quantizes=not saved)
    assert any(name.endswith("topk_weights") for name in read_tensors(adapter.path / TENSORS)) == saved


@pytest.mark.parametrize("saved", [False, True], ids=["logits", "chosen"])
def test_conv1d_is_pefts(tmp_path: Path, saved: bool) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    targets = ["c_attn", "c_proj", "c_fc"]
    config = VBLoRAConfig(
        **OPTIONS, target_modules=targets, fan_in_fan_out=True, save_only_topk_weights=saved
    )
    merge_as_peft(tmp_path, base, config, quantizes=False)


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(tmp_path, base, VBLoRAConfig(**OPTIONS, target_modules=["q_proj", "down_proj"]))


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, VBLoRAConfig(**OPTIONS, target_modules=["q_proj"])).path


@pytest.fixture
def chosen(tmp_path: Path, base: Path) -> Path:
    config = VBLoRAConfig(**OPTIONS, target_modules=["q_proj"], save_only_topk_weights=True)
    return save_adapter(tmp_path / "chosen", base, config).path


def test_what_does_not_fit_is_refused(base: Path, adapter: Path, chosen: Path) -> None:
    edit_tensors(adapter / TENSORS, put={A: torch.ones(4, 4, 19)})
    refuse(base, adapter, AdapterError, "expected 20 numbers for each piece")
    for shape in [(3, 4, 20), (4, 3, 20)]:
        edit_tensors(adapter / TENSORS, put={A: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "pieces of 8 numbers, .*trained on this base")
    edit_tensors(chosen / TENSORS, put={f"{A}_topk_weights": torch.ones(4, 4, 3)})
    refuse(base, chosen, AdapterError, "topk_weights has shape .*, expected 2 numbers")


def test_a_bank_that_the_config_does_not_give_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, num_vectors=21)
    refuse(base, adapter, AdapterError, "vector_bank has shape .*num_vectors and vector_length")
    edit_tensors(adapter / TENSORS, drop=[BANK])
    refuse(base, adapter, AdapterError, "vblora_vector_bank is missing")


@pytest.mark.parametrize("value", [20, -1, 0.5])
def test_a_vector_that_is_none_is_refused(base: Path, chosen: Path, value: float) -> None:
    indices = read_tensors(chosen / TENSORS)[f"{A}_topk_indices"].float()
    indices[0, 1, 2] = value
    edit_tensors(chosen / TENSORS, put={f"{A}_topk_indices": indices})
    refuse(base, chosen, AdapterError, "holds numbers that are no vectors of")


def test_a_missing_tensor_is_refused(base: Path, adapter: Path, chosen: Path) -> None:
    edit_tensors(adapter / TENSORS, drop=[A])
    refuse(base, adapter, AdapterError, "q_proj.vblora_logits_A is missing")
    for key in ("A_topk_weights", "B_topk_weights"):
        name = A.removesuffix("A") + key
        stored = read_tensors(chosen / TENSORS)[name]
        edit_tensors(chosen / TENSORS, drop=[name])
        refuse(base, chosen, AdapterError, f"vblora_logits_{key} is missing")
        edit_tensors(chosen / TENSORS, put={name: stored})


def test_every_tensor_counts(base: Path, adapter: Path, chosen: Path) -> None:
    edit_tensors(adapter / TENSORS, put={A.replace("logits_A", "other"): torch.ones(4)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")
    edit_tensors(chosen / TENSORS, put={A: torch.ones(4, 4, 20)})
    refuse(base, chosen, AdapterError, "say the same thing twice")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, VBLoRAConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, bias="some")
    refuse(base, adapter, UnsupportedError, "bias is")


def test_a_bank_of_zeros_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={BANK: torch.zeros(20, 8)})
    refuse(base, adapter, AdapterError, r"every update is zero \(vblora_vector_bank\)")


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    config = {"peft_type": "VBLORA", "target_modules": ["layer"], **OPTIONS}
    stored = {
        "base_model.model.layer.vblora_logits_A": torch.randn(4, 4096, 20),
        "base_model.model.layer.vblora_logits_B": torch.randn(300, 4, 20),
        BANK: torch.randn(20, 8),
    }
    folder = save_by_hand(tmp_path / "a", config, {"x": torch.ones(1)})
    edit_tensors(folder / TENSORS, put=stored, drop=["base_model.model.x"])
    ((update, peak),) = held(read_for(folder, {"layer.weight": (2400, 4096 * 8)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["vectors"], found["topk"]) == ("VBLORA", 4, 20, 3)
