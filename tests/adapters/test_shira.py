"""SHiRA: against PEFT, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig

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

# Of torch, about what PEFT does with it.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.shira_weight"
INDICES = WEIGHT.replace("weight", "indices")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("shira") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "target_modules": "all-linear"},
        {"r": 3, "target_modules": ["q_proj", "down_proj", "lm_head"], "random_seed": 5},
        {"r": 1, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["all linear", "head", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    adapter = merge_as_peft(tmp_path, base, ShiraConfig(**options))
    stored = read_tensors(adapter.path / TENSORS)
    assert {value.dtype for name, value in stored.items() if "indices" in name} == {torch.int32}


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(
        tmp_path, base, ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=2)
    )


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, ShiraConfig(r=2, target_modules=["q_proj"])).path


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_indices_may_be_stored_otherwise(base: Path, adapter: Path, dtype: torch.dtype) -> None:
    """Windows writes them as float32."""
    streamconv.merge(base, adapter, adapter.parent / "expected")
    stored = {key: value.to(dtype) for key, value in read_tensors(adapter / TENSORS).items() if "ind" in key}
    edit_tensors(adapter / TENSORS, put=stored)
    streamconv.merge(base, adapter, adapter.parent / "out")
    found, expected = tensors(adapter.parent / "out"), tensors(adapter.parent / "expected")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("place", "value"), [((0, 3), 32), ((1, 0), -1), ((1, 0), 0.5)])
def test_a_place_that_is_none_is_refused(
    base: Path, adapter: Path, place: tuple[int, int], value: float
) -> None:
    indices = read_tensors(adapter / TENSORS)[INDICES].float()
    indices[place] = value
    edit_tensors(adapter / TENSORS, put={INDICES: indices})
    refuse(base, adapter, AdapterError, "shira_indices holds numbers that are no rows and columns of")


def test_whole_numbers_are_refused_elsewhere(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={WEIGHT: torch.ones(128, dtype=torch.int32)})
    refuse(base, adapter, AdapterError, "shira_weight is stored as I32, expected F32, F16 or BF16")
    edit_tensors(
        adapter / TENSORS, put={WEIGHT: torch.ones(128), INDICES: torch.ones(2, 128, dtype=torch.bool)}
    )
    refuse(base, adapter, AdapterError, "shira_indices is stored as BOOL")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(127,), (128, 1)]:
        edit_tensors(adapter / TENSORS, put={WEIGHT: torch.ones(shape)})
        refuse(base, adapter, AdapterError, r"expected \[n\] and \[2, n\]")
    edit_tensors(adapter / TENSORS, put={WEIGHT: torch.ones(64), INDICES: torch.ones(2, 64)})
    refuse(base, adapter, AdapterError, "has 64 numbers, but r .* give 128")


@pytest.mark.parametrize("key", [WEIGHT, INDICES])
def test_a_missing_tensor_is_refused(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[key])
    refuse(base, adapter, AdapterError, f"{key.removeprefix('base_model.model.')} is missing")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT trains none; a square one would be taken for what it is not."""
    base = save_base(tmp_path / "base", gpt2_config())
    stored = {"shira_weight": torch.ones(64), "shira_indices": torch.ones(2, 64)}
    config = {"peft_type": "SHIRA", "r": 1, "target_modules": ["c_proj"]}
    folder = save_by_hand(
        tmp_path / "a", config, {f"transformer.h.0.attn.c_proj.{key}": value for key, value in stored.items()}
    )
    refuse(base, folder, AdapterError, "for the weight of a linear layer")


def test_every_tensor_counts(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={WEIGHT.replace("weight", "other"): torch.ones(128)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, ShiraConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, r=3)
    refuse(base, adapter, AdapterError, "has 128 numbers, but r .* give 192")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {WEIGHT.replace(".0.", f".{layer}."): torch.zeros(128) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, r"every update is zero \(all shira_weight\)")


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    count = 20 * (700 + 900)
    stored = {"layer.shira_weight": torch.ones(count), "layer.shira_indices": torch.ones(2, count)}
    config = {"peft_type": "SHIRA", "r": 20, "target_modules": ["layer"]}
    folder = save_by_hand(tmp_path / "a", config, stored)
    ((update, peak),) = held(read_for(folder, {"layer.weight": (700, 900)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["r"], found["numbers"]) == ("SHIRA", 2, 256)
