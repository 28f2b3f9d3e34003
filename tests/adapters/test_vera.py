"""VeRA: against PEFT, with projections that are saved and such that are drawn again, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, read_for, save_by_hand
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

A, B = "base_model.vera_A", "base_model.vera_B"
Q = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("vera") / "base", llama_config())


def vera(**options: Any) -> VeraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of projections that are not saved
        return VeraConfig(r=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "save_projection": False, "projection_prng_key": 5},
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["saved", "drawn", "one shape"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    adapter = merge_as_peft(tmp_path, base, vera(**options)).path
    assert (A in read_tensors(adapter / TENSORS)) == options.get("save_projection", True)


@pytest.mark.parametrize("saves", [True, False])
def test_conv1d_is_pefts(tmp_path: Path, saves: bool) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    targets = ["c_attn", "c_proj", "c_fc"]
    config = vera(target_modules=targets, save_projection=saves, fan_in_fan_out=True)
    merge_as_peft(tmp_path, base, config, quantizes=False)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, vera(target_modules=["q_proj", "down_proj"])).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


@pytest.mark.parametrize("renamed", ["base_model.vera_A.default", "_orig_mod.base_model.vera_A.default"])
def test_names_of_a_state_dict_are_understood(base: Path, adapter: Path, renamed: str) -> None:
    edit_tensors(adapter / TENSORS, rename={A: renamed})
    streamconv.merge(base, adapter, adapter.parent / "out")


@pytest.mark.parametrize("key", [A, B])
def test_a_missing_projection_is_refused(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[key])
    refuse(base, adapter, AdapterError, f"{key} is missing, though")
    edit_tensors(adapter / TENSORS, drop=[A if key == B else B])
    refuse(base, adapter, AdapterError, "vera_A and base_model.vera_B are missing, though save_projection")


def test_projections_without_a_seed_are_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, drop=[A, B])
    edit_json(adapter / CONFIG, save_projection=False, projection_prng_key=None)
    refuse(base, adapter, AdapterError, "projection_prng_key must be the whole number")


def test_projections_that_are_too_small_are_refused(base: Path, adapter: Path) -> None:
    for key, shape in [(A, (8, 71)), (A, (9, 72)), (B, (31, 8)), (B, (32, 7)), (B, (32,))]:
        found = read_tensors(adapter / TENSORS)[key]
        edit_tensors(adapter / TENSORS, put={key: torch.ones(shape)})
        refuse(base, adapter, AdapterError, f"{key} has shape .* or more")
        edit_tensors(adapter / TENSORS, put={key: found})


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(31,), (32, 1), ()]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "a number for each output")
    edit_tensors(adapter / TENSORS, put={Q: torch.ones(32), Q[:-1] + "d": torch.ones(7)})
    refuse(base, adapter, AdapterError, r"gives the rank 8 \(r\)")
    edit_tensors(adapter / TENSORS, drop=[Q])
    refuse(base, adapter, AdapterError, "q_proj.vera_lambda_b is missing")


@pytest.mark.parametrize(
    "key",
    [Q.replace("lambda_b", "lambda_c"), Q.replace("vera_lambda_b", "vera_A"), "base_model.model.vera_A"],
)
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={key: torch.ones(32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_other_shared_tensors_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_tensors(adapter / TENSORS, put={"base_model.vera_C": torch.ones(2)})
    refuse(base, adapter, AdapterError, "base_model.vera_C does not belong to a PEFT adapter")
    edit_tensors(adapter / TENSORS, drop=["base_model.vera_C"], put={f"{A}.default": torch.ones(8, 72)})
    refuse(base, adapter, AdapterError, "are the same thing twice")
    # Projections of no layer: what was trained is in modules_to_save alone.
    config = {"peft_type": "VERA", "r": 8, "target_modules": [], "modules_to_save": ["layer"]}
    folder = save_by_hand(tmp_path / "saved", config, {"layer.weight": torch.ones(3, 2)})
    edit_tensors(folder / TENSORS, put={A: torch.ones(8, 3)})
    with pytest.raises(AdapterError, match=r"1 tensors would not be used: base_model\.vera_A"):
        read_for(folder, {"layer.weight": (3, 2)})


@pytest.mark.parametrize("field", ["rank_pattern", "lora_alpha", "layer_replication"])
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]]})
    refuse(base, adapter, UnsupportedError, f"the field '{field}'")


def test_an_untrained_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "x", base, vera(target_modules=["q_proj"])).path
    tensors = read_tensors(folder / TENSORS)
    edit_tensors(folder / TENSORS, put={key: torch.zeros(32) for key in tensors if key.endswith("lambda_b")})
    refuse(base, folder, AdapterError, "every update is zero")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(VeraConfig)} <= set(ADAPTERS["VERA"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["rank"], found["projections"]) == ("VERA", 8, "saved")
