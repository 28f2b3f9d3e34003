"""IA3: against PEFT, its gains on weights and biases, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"
QWEN2 = Qwen2Config(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ALL = ["q_proj", "k_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("ia3") / "base", llama_config())


@pytest.mark.parametrize("feedforward", [[], ["down_proj"], ALL, r".*\.1\..*proj"], ids=str)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, feedforward: Any) -> None:
    merge_as_peft(tmp_path, base, IA3Config(target_modules=ALL, feedforward_modules=feedforward))


def test_biases_are_multiplied_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", QWEN2)
    merge_as_peft(tmp_path, base, IA3Config(target_modules=ALL, feedforward_modules=["k_proj"]))


@pytest.mark.parametrize("feedforward", [[], ["c_proj"], CONV1D], ids=str)
def test_conv1d_is_pefts(tmp_path: Path, feedforward: list[str]) -> None:
    """Square ones among them, whose orientation the model tells."""
    base = save_base(tmp_path / "base", gpt2_config())
    config = IA3Config(target_modules=CONV1D, feedforward_modules=feedforward, fan_in_fan_out=True)
    merge_as_peft(tmp_path, base, config, quantizes=False)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 10, (3, 2))
        self.three = nn.Conv3d(6, 10, 2, bias=False)
        self.grouped = nn.Conv2d(6, 10, 3, groups=2)
        self.pointwise = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(x)
        return found


@pytest.mark.parametrize("is_feedforward", [False, True])
def test_convolutions_are_pefts(tmp_path: Path, is_feedforward: bool) -> None:
    torch.manual_seed(0)
    model, targets = Convolutions(), ["two", "three", "grouped", "pointwise"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = IA3Config(
        target_modules=targets, feedforward_modules=targets if is_feedforward else [], init_ia3_weights=False
    )
    live = get_peft_model(model, config)
    live.save_pretrained(tmp_path)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    expected = live.merge_and_unload().state_dict()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert not torch.equal(found["grouped.weight"], weights["grouped.weight"])
    assert torch.equal(found["two.bias"], weights["two.bias"]) == is_feedforward


def test_the_product_is_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, gain = torch.randn(70, 30), torch.randn(70, 1)
    config = {"peft_type": "IA3", "target_modules": ["layer"], "feedforward_modules": []}
    adapter = read_for(
        save_by_hand(tmp_path / "a", config, {"layer.ia3_l": gain}), {"layer.weight": (70, 30)}
    )
    found = merged_by_hand(adapter, {"layer.weight": weight})["layer.weight"]
    assert torch.equal(found, (weight.double() * gain.double()).float())


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    return save_adapter(tmp_path / "adapter", base, config).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(1, 32), (31, 1), (32,), (32, 1, 1), (0, 1)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "ia3_l has shape .* a number for each output")


@pytest.mark.parametrize("modules", [[], ["q_proj", "down_proj"], r".*q_proj"], ids=str)
def test_another_feedforward_than_in_training_is_refused(base: Path, adapter: Path, modules: Any) -> None:
    edit_json(adapter / CONFIG, feedforward_modules=modules)
    refuse(base, adapter, AdapterError, "of one adapter")


def test_a_broken_pattern_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, feedforward_modules="(")
    refuse(base, adapter, AdapterError, "is not a regular expression")


def test_conv_gains_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = {"peft_type": "IA3", "target_modules": ["layer"], "feedforward_modules": ["layer"]}
    for shape in [(1, 13, 1, 1), (1, 35, 1, 1), (7, 1, 1, 1), (1, 7), (1, 0, 1, 1)]:
        folder = save_by_hand(tmp_path / "a", config, {"layer.ia3_l": torch.rand(shape)})
        with pytest.raises(AdapterError, match="a number for each input"):
            read_for(folder, {"layer.weight": (12, 7, 3, 5)})


@pytest.mark.parametrize("key", ["ia3_k", "ia3_l.weight", "lora_A.weight"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("ia3_l", key): torch.ones(32, 1)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_the_name_of_the_adapter_is_left_out(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, rename={Q: f"{Q}.default"})
    streamconv.merge(base, adapter, adapter.parent / "out")


@pytest.mark.parametrize("field", ["bias", "lora_alpha", "layer_replication"])
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]] if field == "layer_replication" else "on"})
    refuse(base, adapter, UnsupportedError, f"the field '{field}'")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    path = adapter / TENSORS
    with torch.no_grad():
        names = {
            Q.replace(".0.self_attn.q_proj", f".{layer}.{module}"): torch.ones(shape)
            for layer in range(2)
            for module, shape in (("self_attn.q_proj", (32, 1)), ("mlp.down_proj", (1, 72)))
        }
    edit_tensors(path, put=names)
    refuse(base, adapter, AdapterError, r"every update is one \(all ia3_l\)")
    edit_tensors(path, put={Q: torch.full((32, 1), 2.0)})
    streamconv.merge(base, adapter, adapter.parent / "out")


def test_the_card_names_the_method(base: Path, adapter: Path) -> None:
    streamconv.merge(base, adapter, adapter.parent / "out")
    card = (adapter.parent / "out" / "README.md").read_text()
    assert "An IA3 adapter that updates 4 modules (down_proj, q_proj) was merged" in card
    assert "- ia3\n" in card


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(peft.IA3Config)} <= set(ADAPTERS["IA3"].fields)
