"""HRA: against PEFT, in float64, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config

import streamconv
from streamconv.errors import AdapterError, InputError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
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

QWEN2 = Qwen2Config(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
Q = "base_model.model.model.layers.0.self_attn.q_proj.hra_u"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("hra") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 3, "target_modules": ["q_proj", "down_proj", "lm_head"]},
        {"r": 4, "target_modules": ["v_proj", "down_proj"], "apply_GS": True},
        {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "init_weights": False},
    ],
    ids=["all linear", "odd", "orthogonal", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, HRAConfig(**options))


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(tmp_path, base, HRAConfig(r=4, target_modules=["q_proj", "down_proj"]))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Conv2d(6, 10, 3)
        self.pointwise = nn.Conv2d(6, 10, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.pointwise(x)
        return found


@pytest.mark.parametrize("orthogonal", [False, True])
def test_convolutions_are_pefts(tmp_path: Path, orthogonal: bool) -> None:
    torch.manual_seed(0)
    model, targets = Convolutions(), ["three", "pointwise"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    live = get_peft_model(
        model, HRAConfig(r=3, target_modules=targets, apply_GS=orthogonal, init_weights=False)
    )
    live.save_pretrained(tmp_path)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    expected = live.merge_and_unload().state_dict()
    for name in targets:
        weight = f"{name}.weight"
        assert not torch.equal(expected[weight], weights[weight])
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-5, atol=1e-6)


def by_hand(folder: Path, columns: Tensor, **fields: Any) -> Path:
    config = {"peft_type": "HRA", "r": columns.shape[1], "target_modules": ["layer"], **fields}
    return save_by_hand(folder, config, {"layer.hra_u": columns})


@pytest.mark.parametrize("orthogonal", [False, True])
def test_long_chains_follow_the_formula(tmp_path: Path, orthogonal: bool) -> None:
    """Columns in pairs that training has hardly moved apart, of very different lengths."""
    torch.manual_seed(0)
    columns = torch.randn(300, 16).repeat_interleave(2, dim=1) * torch.logspace(-4, 4, 32)
    columns *= 1 + (0.05 if orthogonal else 1e-4) * torch.randn(300, 32)
    weight = torch.randn(70, 300)
    folder = by_hand(tmp_path / "a", columns, apply_GS=orthogonal)
    found = merged_by_hand(read_for(folder, {"layer.weight": (70, 300)}), {"layer.weight": weight})
    expected, done = weight.double(), torch.zeros(300, 0, dtype=torch.float64)
    for column in columns.double().T:
        u = column
        for other in done.T if orthogonal else ():
            u = u - (other @ u) * other
        u = u / u.norm()
        done = torch.cat([done, u[:, None]], dim=1)
        expected = expected - 2 * torch.outer(expected @ u, u)
    torch.testing.assert_close(found["layer.weight"], expected.float(), rtol=1e-5, atol=5e-6)


def test_where_training_left_pairs_equal_no_bit_changes(tmp_path: Path) -> None:
    columns = torch.randn(30, 2).repeat_interleave(2, dim=1)
    weight = torch.randn(20, 30)
    folder = by_hand(tmp_path / "a", columns)
    found = merged_by_hand(read_for(folder, {"layer.weight": (20, 30)}), {"layer.weight": weight})
    assert torch.equal(found["layer.weight"], weight)
    columns[0, 3] += 1
    found = merged_by_hand(
        read_for(by_hand(tmp_path / "a", columns), {"layer.weight": (20, 30)}), {"layer.weight": weight}
    )
    assert not torch.equal(found["layer.weight"], weight)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, HRAConfig(r=4, target_modules=["q_proj"])).path


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_column_without_a_direction_is_in_no_output(base: Path, adapter: Path, orthogonal: bool) -> None:
    """PEFT's live model answers NaN, or by what rounding made of the rest."""
    edit_json(adapter / CONFIG, apply_GS=orthogonal)
    columns = read_tensors(adapter / TENSORS)[Q]
    columns[:, 2] = columns[:, 1] if orthogonal else 0
    edit_tensors(adapter / TENSORS, put={Q: columns})
    refuse(base, adapter, InputError, "q_proj.weight.* NaN")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(31, 4), (4, 32), (32,), (32, 4, 1)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "hra_u has shape .*trained on this base")
    edit_tensors(adapter / TENSORS, put={Q: torch.ones(32, 5)})
    refuse(base, adapter, AdapterError, "has 5 reflections, but r is 4")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT trains none; a square one would be taken for what it is not."""
    base = save_base(tmp_path / "base", gpt2_config())
    columns = {"transformer.h.0.attn.c_proj.hra_u": torch.randn(32, 2)}
    config = {"peft_type": "HRA", "r": 2, "target_modules": ["c_proj"]}
    refuse(base, save_by_hand(tmp_path / "a", config, columns), AdapterError, "trained on this base")


def test_every_tensor_counts(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("hra_u", "hra_v"): torch.ones(32, 4)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, HRAConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, bias="some")
    refuse(base, adapter, UnsupportedError, "bias is")


def test_trained_biases_replace_the_bases(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", QWEN2)
    config = HRAConfig(r=2, target_modules=["q_proj", "up_proj"], bias="hra_only")
    merge_as_peft(tmp_path, base, config, quantizes=False)


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(
        adapter / TENSORS, put={Q.replace(".0.", f".{layer}."): torch.ones(32, 4) for layer in range(2)}
    )
    refuse(base, adapter, AdapterError, "every update is a chain of reflections that undo each other")


@pytest.mark.parametrize("orthogonal", [False, True])
def test_what_is_held_is_counted(tmp_path: Path, orthogonal: bool) -> None:
    columns = torch.randn(4096, 16)
    folder = by_hand(tmp_path / "a", columns, apply_GS=orthogonal)
    ((update, peak),) = held(read_for(folder, {"layer.weight": (40, 4096)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["reflections"], found["apply_GS"]) == ("HRA", 4, False)
