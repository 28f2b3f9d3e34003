"""DeLoRA: against PEFT, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import DeloraConfig

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.adapters.trials import check_fields, held, merge_on_other_bases, refuse
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.delora_"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("delora") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj", "down_proj", "lm_head"],
            "rank_pattern": {"down_proj": 3},
            "lambda_pattern": {"q_proj": 5},
        },
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "init_weights": False},
    ],
    ids=["all linear", "patterns", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, DeloraConfig(r=4, delora_lambda=2, **options))


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    """The norms of columns are those that were saved."""
    config = DeloraConfig(r=4, delora_lambda=2, target_modules=["q_proj", "down_proj"])
    merge_on_other_bases(tmp_path, base, config)


def test_rows_of_nothing_are_divided_by_no_less_than_pefts_bound(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 30), torch.randn(20, 2)
    a[0] *= 1e-6
    stored = {"A": a, "B": b, "lambda": torch.tensor([3.0]), "w_norm": torch.rand(30)}
    weight = torch.randn(20, 30)
    config = {"peft_type": "DELORA", "r": 2, "target_modules": ["layer"]}
    folder = save_by_hand(
        tmp_path / "a", config, {f"layer.delora_{key}": value for key, value in stored.items()}
    )
    found = merged_by_hand(read_for(folder, {"layer.weight": (20, 30)}), {"layer.weight": weight})
    shares = 3 / 2 / (a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0))
    expected = weight + (b * shares) @ a * stored["w_norm"]
    torch.testing.assert_close(found["layer.weight"], expected)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, DeloraConfig(r=4, target_modules=["q_proj"])).path


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    good = {"A": (4, 32), "B": (32, 4), "lambda": (1,), "w_norm": (32,)}
    for role, shape in [("A", (4, 31)), ("B", (32, 3)), ("lambda", (2,)), ("w_norm", (31,)), ("A", (4,))]:
        put = {Q + each: torch.ones(shape if each == role else size) for each, size in good.items()}
        edit_tensors(adapter / TENSORS, put=put)
        refuse(base, adapter, AdapterError, f"delora_{role} has shape .*trained on this base")


@pytest.mark.parametrize("role", ["A", "B", "lambda", "w_norm"])
def test_a_missing_tensor_is_refused(base: Path, adapter: Path, role: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q + role])
    refuse(base, adapter, AdapterError, f"q_proj.delora_{role} is missing")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT trains none; a square one would be taken for what it is not."""
    base = save_base(tmp_path / "base", gpt2_config())
    stored = {"A": (2, 32), "B": (32, 2), "lambda": (1,), "w_norm": (32,)}
    module = "transformer.h.0.attn.c_proj.delora_"
    config = {"peft_type": "DELORA", "r": 2, "target_modules": ["c_proj"]}
    folder = save_by_hand(
        tmp_path / "a", config, {module + key: torch.ones(shape) for key, shape in stored.items()}
    )
    refuse(base, folder, AdapterError, "the weight of a linear layer")


def test_every_tensor_counts(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={f"{Q}C": torch.ones(4, 32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, DeloraConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, r=5)
    refuse(base, adapter, AdapterError, "has rank 4, but .* the rank 5")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {f"{Q}B".replace(".0.", f".{layer}."): torch.zeros(32, 4) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, "every update is zero")


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    stored = {"A": (16, 4096), "B": (40, 16), "lambda": (1,), "w_norm": (4096,)}
    config = {"peft_type": "DELORA", "r": 16, "target_modules": ["layer"]}
    folder = save_by_hand(
        tmp_path / "a", config, {f"layer.delora_{key}": torch.ones(shape) for key, shape in stored.items()}
    )
    ((update, peak),) = held(read_for(folder, {"layer.weight": (40, 4096)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"]) == ("DELORA", [4])
