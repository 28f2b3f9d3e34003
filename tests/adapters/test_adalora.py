"""AdaLoRA: against PEFT, with ranks as training began and pruned, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, load_live, merge_as_peft, merged_by_hand, read_for
from tests.parity.opening import logits_differ_by, open_model
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
KEPT = [True, False, True, False, False, True]
PATTERN = {
    f"model.layers.{layer}.self_attn.q_proj.lora_E": kept for layer, kept in enumerate([KEPT, [False] * 6])
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("adalora") / "base", llama_config())


def adalora(**options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=6, target_r=3, total_step=10, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "lora_alpha": 5},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 0},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "use_rslora": True},
    ],
    ids=["all linear", "no alpha", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, adalora(**options))


def test_conv1d_is_pefts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    config = adalora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merge_as_peft(tmp_path, base, config, quantizes=False)


def test_convolutions_are_pefts(tmp_path: Path) -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = nn.Conv2d(6, 10, (3, 2))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(x)
            return found

    torch.manual_seed(0)
    model = Convolutions()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    live = get_peft_model(model, adalora(target_modules=["two"], init_lora_weights=False))
    live.save_pretrained(tmp_path)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    expected = live.merge_and_unload().state_dict()["two.weight"]
    assert not torch.equal(expected, weights["two.weight"])
    torch.testing.assert_close(found["two.weight"], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, adalora(target_modules=["q_proj", "v_proj"])).path


@pytest.mark.filterwarnings("ignore:.*zero-sized lora_A")
def test_pruned_ranks_are_pefts(tmp_path: Path, base: Path) -> None:
    """As PEFT saves them; as it loads them again; and where a file has all of them, the list chooses the same."""
    made = save_adapter(tmp_path / "adapter", base, adalora(target_modules=["q_proj", "v_proj"]))
    whole = read_tensors(made.path / TENSORS)
    made.live.peft_config["default"].rank_pattern = dict(PATTERN)
    made.live.save_pretrained(made.path)
    pruned = read_tensors(made.path / TENSORS)
    assert (pruned[Q].shape, pruned[Q.replace(".0.", ".1.")].shape) == ((3, 32), (0, 32))
    streamconv.merge(base, made.path, tmp_path / "out")
    live = logits(load_live(base, made.path))
    assert logits_differ_by(open_model(tmp_path / "out"), live) < 1e-4

    assert json.loads((made.path / CONFIG).read_text())["rank_pattern"] == PATTERN
    edit_tensors(made.path / TENSORS, put=whole)
    streamconv.merge(base, made.path, tmp_path / "chosen")
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("out", "chosen"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(6, 31), (5, 32), (6,), (6, 32, 1)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "lora_A .* do not fit .*trained on this base")


@pytest.mark.parametrize("role", ["lora_A", "lora_B", "lora_E"])
def test_a_missing_factor_is_refused(base: Path, adapter: Path, role: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q.replace("lora_A", role)])
    refuse(base, adapter, AdapterError, f"q_proj.{role} is missing")


def test_another_rank_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, init_r=5)
    refuse(base, adapter, AdapterError, "has rank 6, but .* the rank 5")
    edit_json(adapter / CONFIG, init_r=6, rank_pattern={name: [True, False] for name in PATTERN})
    refuse(base, adapter, AdapterError, "has rank 6, but .* the rank 1")


@pytest.mark.parametrize("pattern", [{"q_proj": 3}, {"q_proj": [1, 0]}, [True]], ids=str)
def test_a_rank_pattern_of_another_kind_is_refused(base: Path, adapter: Path, pattern: Any) -> None:
    edit_json(adapter / CONFIG, rank_pattern=pattern)
    refuse(base, adapter, AdapterError, "rank_pattern must have, for each module, a list of true and false")


@pytest.mark.parametrize("key", ["lora_F", "lora_A.weight", "ranknum", "hada_w1_a"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("lora_A", key): torch.ones(6, 32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


@pytest.mark.parametrize("field", ["use_dora", "use_qalora", "layer_replication", "rank", "kasa_config"])
def test_other_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: {} if field == "kasa_config" else [[0, 2]]})
    refuse(base, adapter, UnsupportedError, field)


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    tensors = read_tensors(adapter / TENSORS)
    zeros = {key: torch.zeros(6, 1) for key in tensors if key.endswith("lora_E")}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, "every update is zero")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(AdaLoraConfig)} <= set(ADAPTERS["ADALORA"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["alpha"]) == ("ADALORA", 6, 8)
