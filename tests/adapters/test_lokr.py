"""LoKr: against PEFT and float64, factors whole and decomposed, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from torch import Tensor, nn

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.tiny import edit_json, edit_tensors, llama_config, read_tensors, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.lokr_w1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("lokr") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "target_modules": "all-linear"},
        {"r": 1, "target_modules": "all-linear", "decompose_both": True, "decompose_factor": 4},
        {
            "r": 1,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
        {"r": 8, "target_modules": ["k_proj", "lm_head"]},
        {"r": 2, "target_modules": ["up_proj"], "decompose_factor": 16, "decompose_both": True},
    ],
    ids=["all linear", "both", "patterns", "whole", "wide left"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, LoKrConfig(alpha=6, init_weights=False, **options))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 10, (3, 2))
        self.one = nn.Conv1d(6, 10, 5)
        self.grouped = nn.Conv2d(12, 10, 3, groups=2)
        self.pointwise = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(x)
        return found


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_convolutions_are_pefts(tmp_path: Path, tucker: bool, rank: int) -> None:
    """With a rank of 3 the factors are whole; a kernel of one axis then has the product that PEFT makes of it."""
    torch.manual_seed(0)
    model, targets = Convolutions(), ["two", "one", "grouped", "pointwise"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoKrConfig(
        r=rank, alpha=5, target_modules=targets, use_effective_conv2d=tucker, init_weights=False
    )
    live = get_peft_model(model, config)
    live.save_pretrained(tmp_path)
    roles = {key.rpartition("_")[2] for key in read_tensors(tmp_path / TENSORS)}
    assert ("t2" in roles) == (tucker and rank == 2)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    expected = live.merge_and_unload().state_dict()
    for name in targets:
        weight = f"{name}.weight"
        assert not torch.equal(expected[weight], weights[weight])
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [((7, 2), (10, 4500)), ((35, 4500), (2, 2))])
def test_wide_factors_follow_the_formula(
    tmp_path: Path, left: tuple[int, int], right: tuple[int, int]
) -> None:
    """More columns than are made at a time, of either."""
    torch.manual_seed(0)
    parts = {
        "w1_a": torch.randn(left[0], 3),
        "w1_b": torch.randn(3, left[1]),
        "w2_a": torch.randn(right[0], 3),
        "w2_b": torch.randn(3, right[1]),
    }
    config = {"peft_type": "LOKR", "r": 3, "alpha": 6, "target_modules": ["layer"]}
    folder = save_by_hand(
        tmp_path / "a", config, {f"layer.lokr_{role}": part for role, part in parts.items()}
    )
    weight = torch.randn(70, 9000)
    found = merged_by_hand(read_for(folder, {"layer.weight": (70, 9000)}), {"layer.weight": weight})
    full = {role: part.double() for role, part in parts.items()}
    expected = weight + 2 * torch.kron(full["w1_a"] @ full["w1_b"], full["w2_a"] @ full["w2_b"])
    torch.testing.assert_close(found["layer.weight"], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """q_proj has w1 [4, 4], w2_a [8, 2] and w2_b [2, 8]."""
    config = LoKrConfig(r=2, alpha=6, target_modules=["q_proj"], init_weights=False)
    return save_adapter(tmp_path / "adapter", base, config).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(4, 3), (2, 2), (4,), (4, 4, 1)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "lokr_w1 .* no factors of a Kronecker product")
    edit_tensors(adapter / TENSORS, put={Q: torch.ones(4, 4), f"{Q[:-1]}2_a": torch.ones(8, 3)})
    refuse(base, adapter, AdapterError, "no factors of a Kronecker product")


@pytest.mark.parametrize("role", ["w1", "w2_a", "w2_b"])
def test_a_missing_factor_is_refused(base: Path, adapter: Path, role: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q.replace("w1", role)])
    refuse(base, adapter, AdapterError, f"q_proj.lokr_{role} is missing")


@pytest.mark.parametrize(("role", "shape"), [("w2", (8, 8)), ("w1_a", (4, 2)), ("w1_b", (2, 4))])
def test_a_factor_that_is_there_twice_is_refused(
    base: Path, adapter: Path, role: str, shape: tuple[int, int]
) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("w1", role): torch.ones(shape)})
    refuse(base, adapter, AdapterError, "are both there, but a factor is saved whole or as a product")


def test_a_core_of_a_linear_layer_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("w1", "t2"): torch.ones(2, 2, 3, 3)})
    refuse(base, adapter, AdapterError, "no factors of a Kronecker product")


def test_a_rank_that_the_config_does_not_give_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, r=5)
    refuse(base, adapter, AdapterError, "has rank 2, but .* the rank 5")


@pytest.mark.parametrize("key", ["lokr_w3", "lokr_t1", "alpha", "lora_A.weight"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("lokr_w1", key): torch.ones(4, 4)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


@pytest.mark.parametrize("field", ["use_rslora", "lora_alpha", "layer_replication"])
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]]})
    refuse(base, adapter, UnsupportedError, f"the field '{field}'")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {Q.replace(".0.", f".{layer}."): torch.zeros(4, 4) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, r"every update is zero \(one of the factors lokr_\*, or alpha\)")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(LoKrConfig)} <= set(ADAPTERS["LOKR"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["alpha"]) == ("LOKR", 2, 6)
