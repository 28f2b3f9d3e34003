"""LoHa: against float64 and PEFT, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, get_peft_model
from torch import Tensor, nn

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.parity.opening import logits_differ_by, open_model
from tests.tiny import edit_json, edit_tensors, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("loha") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=["all linear", "patterns", "saved", "head"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, LoHaConfig(r=4, alpha=6, **options))


def test_a_tied_head_is_untied(tmp_path: Path) -> None:
    tied = save_base(tmp_path / "tied", llama_config(tied=True))
    adapter = save_adapter(tmp_path / "adapter", tied, LoHaConfig(r=4, target_modules=["lm_head"]))
    streamconv.merge(tied, adapter.path, tmp_path / "out")
    assert logits_differ_by(open_model(tmp_path / "out"), adapter.logits()) < 1e-4


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 10, (3, 2))
        self.one = nn.Conv1d(6, 10, 5)
        self.grouped = nn.Conv2d(6, 10, 3, groups=2)
        self.pointwise = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(x)
        return found


@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions_are_pefts(tmp_path: Path, tucker: bool) -> None:
    torch.manual_seed(0)
    model, targets = Convolutions(), ["two", "one", "grouped", "pointwise"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoHaConfig(r=3, alpha=5, target_modules=targets, use_effective_conv2d=tucker, init_weights=False)
    live = get_peft_model(model, config)
    live.save_pretrained(tmp_path)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    expected = live.merge_and_unload().state_dict()
    for name in targets:
        weight = f"{name}.weight"
        assert not torch.equal(expected[weight], weights[weight])
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-6, atol=1e-6)


def test_wide_weights_follow_the_formula(tmp_path: Path) -> None:
    """More columns than are multiplied at a time."""
    torch.manual_seed(0)
    factors = {"w1_a": (70, 4), "w1_b": (4, 9000), "w2_a": (70, 4), "w2_b": (4, 9000)}
    parts = {f"layer.hada_{role}": torch.randn(shape) for role, shape in factors.items()}
    config = {"peft_type": "LOHA", "r": 4, "alpha": 2, "target_modules": ["layer"]}
    weights = {"layer.weight": torch.randn(70, 9000)}
    found = merged_by_hand(
        read_for(save_by_hand(tmp_path / "a", config, parts), {"layer.weight": (70, 9000)}), weights
    )
    full = {key.rpartition("_")[0][-2:] + key[-2:]: value.double() for key, value in parts.items()}
    expected = weights["layer.weight"] + 0.5 * (full["w1_a"] @ full["w1_b"]) * (full["w2_a"] @ full["w2_b"])
    torch.testing.assert_close(found["layer.weight"], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, LoHaConfig(r=4, alpha=6, target_modules=["q_proj"])).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(32, 3), (31, 4), (4, 32), (32,), (32, 4, 1)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "hada_w1_a has shape .* does not fit .*trained on this base")


def test_a_missing_factor_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q])
    refuse(base, adapter, AdapterError, "q_proj.hada_w1_a is missing")


def test_a_rank_that_the_config_does_not_give_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", r=5)
    refuse(base, adapter, AdapterError, "has rank 4, but .* the rank 5")


@pytest.mark.parametrize("key", ["hada_w3_a", "hada_t1.weight", "lora_A.weight", "oft_R.weight"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("hada_w1_a", key): torch.ones(32, 4)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_a_core_of_a_linear_layer_is_refused(base: Path, adapter: Path) -> None:
    cores = {Q.replace("w1_a", role): torch.ones(4, 4, 3, 3) for role in ("t1", "t2")}
    edit_tensors(adapter / TENSORS, put=cores)
    refuse(base, adapter, AdapterError, "belongs to use_effective_conv2d, which is not set")
    edit_json(adapter / "adapter_config.json", use_effective_conv2d=True)
    refuse(base, adapter, AdapterError, "does not fit")


@pytest.mark.parametrize("field", ["use_rslora", "lora_alpha", "use_dora", "layer_replication"])
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / "adapter_config.json", **{field: [[0, 2]] if field == "layer_replication" else 3})
    refuse(base, adapter, UnsupportedError, f"the field '{field}'")


@pytest.mark.parametrize("role", ["w1_a", "w1_b", "w2_a", "w2_b"])
def test_an_untrained_adapter_is_refused(base: Path, adapter: Path, role: str) -> None:
    zeros = {
        Q.replace(".0.", f".{layer}.").replace("w1_a", role): torch.zeros(
            (32, 4) if role[-1] == "a" else (4, 32)
        )
        for layer in range(2)
    }
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, r"every update is zero \(one of the factors hada_\*, or alpha\)")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(peft.LoHaConfig)} <= set(ADAPTERS["LOHA"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["alpha"]) == ("LOHA", 4, 6)
