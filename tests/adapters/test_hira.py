"""HiRA: against PEFT, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, get_peft_model
from torch import Tensor, nn

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.adapters.trials import check_fields, held, merge_on_other_bases, refuse
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.hira_"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("hira") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj", "lm_head"], "rank_pattern": {"down_proj": 3}},
        {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
    ids=["all linear", "patterns", "embedding"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, HiraConfig(r=4, **options))


def test_conv1d_is_pefts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    config = HiraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merge_as_peft(tmp_path, base, config, quantizes=False)


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(tmp_path, base, HiraConfig(r=4, target_modules=["q_proj", "down_proj"]))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 10, (3, 2))
        self.one = nn.Conv1d(6, 10, 5)
        self.three = nn.Conv3d(6, 10, 2)
        self.pointwise = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(x)
        return found


def test_convolutions_are_pefts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, targets = Convolutions(), ["two", "one", "three", "pointwise"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    live = get_peft_model(model, HiraConfig(r=3, target_modules=targets, init_weights=False))
    live.save_pretrained(tmp_path)
    adapter = read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()})
    found, expected = merged_by_hand(adapter, weights), live.merge_and_unload().state_dict()
    for name in targets:
        weight = f"{name}.weight"
        assert not torch.equal(expected[weight], weights[weight])
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-5, atol=1e-6)
    for update, peak in held(adapter):
        assert update.held_bytes / 2 < peak <= update.held_bytes


def test_wide_weights_follow_the_formula(tmp_path: Path) -> None:
    """More columns than are multiplied at a time."""
    torch.manual_seed(0)
    a, b, weight = torch.randn(4, 9000), torch.randn(70, 4), torch.randn(70, 9000)
    config = {"peft_type": "HIRA", "r": 4, "target_modules": ["layer"]}
    folder = save_by_hand(tmp_path / "a", config, {"layer.hira_A": a, "layer.hira_B": b})
    found = merged_by_hand(read_for(folder, {"layer.weight": (70, 9000)}), {"layer.weight": weight})
    expected = weight * (1 + b.double() @ a.double())
    torch.testing.assert_close(found["layer.weight"], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, HiraConfig(r=4, target_modules=["q_proj"])).path


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(4, 31), (3, 32), (32, 4), (32,), (4, 32, 1)]:
        edit_tensors(adapter / TENSORS, put={f"{Q}A": torch.ones(shape)})
        refuse(base, adapter, AdapterError, "does not fit .*trained on this base")
    edit_tensors(adapter / TENSORS, put={f"{Q}A": torch.ones(3, 32), f"{Q}B": torch.ones(32, 3)})
    refuse(base, adapter, AdapterError, "has rank 3, but .* the rank 4")


@pytest.mark.parametrize("role", ["A", "B"])
def test_a_missing_factor_is_refused(base: Path, adapter: Path, role: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q + role])
    refuse(base, adapter, AdapterError, f"q_proj.hira_{role} is missing")


@pytest.mark.parametrize("key", ["C", "embedding_C"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q + key: torch.ones(4, 32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, HiraConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, r=5)
    refuse(base, adapter, AdapterError, "has rank 4, but .* the rank 5")
    edit_json(adapter / CONFIG, rank_pattern={"q_proj": 4})
    streamconv.merge(base, adapter, adapter.parent / "as-the-pattern-says")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {f"{Q}B".replace(".0.", f".{layer}."): torch.zeros(32, 4) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, "every update is zero")


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"]) == ("HIRA", [4])
