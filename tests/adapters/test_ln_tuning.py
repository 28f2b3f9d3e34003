"""LN tuning: against PEFT, norms with and without a bias and whole layers, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft
from tests.parity.opening import logits_differ_by, open_model
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

NORM = "base_model.model.model.norm.ln_tuning_layers.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("ln") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["input_layernorm", "q_proj"]},
    ],
    ids=["all norms", "a linear layer"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, LNTuningConfig(task_type="CAUSAL_LM", **options))


def test_saved_modules_are_merged_too(tmp_path: Path, base: Path) -> None:
    """PEFT's own merge leaves them wrapped."""
    config = LNTuningConfig(target_modules=["norm"], modules_to_save=["lm_head"])
    adapter = save_adapter(tmp_path / "adapter", base, config)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    assert logits_differ_by(open_model(tmp_path / "out"), adapter.logits()) < 1e-4


def test_biases_are_pefts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    merge_as_peft(tmp_path, base, LNTuningConfig(target_modules=["ln_1", "ln_f"]), quantizes=False)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, LNTuningConfig(target_modules=["norm"])).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(31,), (1, 32), ()]:
        edit_tensors(adapter / TENSORS, put={NORM: torch.ones(shape)})
        refuse(
            base,
            adapter,
            AdapterError,
            "ln_tuning_layers.weight has shape .* cannot replace model.norm.weight",
        )


def test_a_bias_that_the_base_has_not_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={NORM.replace("weight", "bias"): torch.ones(32)})
    refuse(base, adapter, AdapterError, "model.norm.bias, which the base model does not have")


def test_a_missing_norm_is_refused(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, target_modules=["norm", "input_layernorm"])
    refuse(base, adapter, AdapterError, "the adapter holds no tensors of it, and the base has")


@pytest.mark.parametrize("key", ["ln_tuning_layers", "weight.lora_A", "base_layer.scale"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={NORM.replace("ln_tuning_layers.weight", key): torch.ones(32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_the_name_of_the_adapter_is_left_out(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, rename={NORM: NORM.replace("layers.", "layers.default.")})
    streamconv.merge(base, adapter, adapter.parent / "out")


@pytest.mark.parametrize("field", ["bias", "r", "layer_replication"])
def test_unknown_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]]})
    refuse(base, adapter, UnsupportedError, f"the field '{field}'")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(LNTuningConfig)} <= set(ADAPTERS["LN_TUNING"].fields)
