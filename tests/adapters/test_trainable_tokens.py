"""Trained rows by themselves: against PEFT, with embedding and head tied and not, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

KEY = "base_model.model.model.embed_tokens.trainable_tokens_delta"
BASES = {"llama": llama_config(), "tied": llama_config(tied=True), "gpt2": gpt2_config()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokens")
    return {name: save_base(folder / name, config) for name, config in BASES.items()}


@pytest.mark.parametrize("targets", [None, ["embed_tokens", "lm_head"], ["lm_head"]], ids=str)
def test_a_merge_is_pefts(tmp_path: Path, bases: dict[str, Path], targets: list[str] | None) -> None:
    config = TrainableTokensConfig(token_indices=[7, 0, 30], target_modules=targets)
    merge_as_peft(tmp_path, bases["llama"], config)


@pytest.mark.parametrize(
    ("name", "targets", "unties"), [("tied", None, False), ("gpt2", None, False), ("tied", ["lm_head"], True)]
)
def test_rows_of_tied_tensors(
    tmp_path: Path, bases: dict[str, Path], name: str, targets: list[str] | None, unties: bool
) -> None:
    """Rows of the embedding are the head's as well; those of the head alone are not."""
    config = TrainableTokensConfig(token_indices=[7, 0, 30], target_modules=targets)
    adapter = save_adapter(tmp_path / "adapter", bases[name], config)
    streamconv.merge(bases[name], adapter.path, tmp_path / "out")
    assert ("lm_head.weight" in tensors(tmp_path / "out")) == unties
    assert logits_differ_by(open_model(tmp_path / "out"), adapter.logits()) < 1e-4


def test_a_resized_vocabulary(tmp_path: Path, bases: dict[str, Path]) -> None:
    config = TrainableTokensConfig(token_indices=[41, 3])
    adapter = save_adapter(tmp_path / "adapter", bases["tied"], config, resize_to=44)
    streamconv.merge(bases["tied"], adapter.path, tmp_path / "out", tokenizer="base")
    assert logits_differ_by(open_model(tmp_path / "out"), adapter.logits()) < 1e-4


@pytest.fixture
def adapter(tmp_path: Path, bases: dict[str, Path]) -> Path:
    config = TrainableTokensConfig(token_indices=[7, 0, 30])
    return save_adapter(tmp_path / "adapter", bases["llama"], config).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([7, 0], "a row for each of the 2 tokens that token_indices"),
        ([7, 0, 40], "token_indices lists token 40, but model.embed_tokens.weight has 40 rows"),
        ([7, 0, 7], "token_indices lists a token twice"),
        ([7, 0, "1"], "token_indices must list the rows"),
        (None, "token_indices must list the rows"),
    ],
    ids=str,
)
def test_other_indices_are_refused(bases: dict[str, Path], adapter: Path, indices: Any, match: str) -> None:
    edit_json(adapter / CONFIG, token_indices=indices)
    refuse(bases["llama"], adapter, AdapterError, match)


def test_a_missing_tensor_is_refused(bases: dict[str, Path], adapter: Path) -> None:
    extra = {KEY.replace("model.embed_tokens", "lm_head"): torch.ones(3, 32)}
    edit_tensors(adapter / TENSORS, drop=[KEY], put=extra)
    refuse(bases["llama"], adapter, AdapterError, "no module in the adapter matches it")


@pytest.mark.parametrize(
    "key", ["trainable_tokens_original", "lora_embedding_A", "trainable_tokens_delta.weight"]
)
def test_every_tensor_counts(bases: dict[str, Path], adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={KEY.replace("trainable_tokens_delta", key): torch.ones(3, 32)})
    refuse(bases["llama"], adapter, AdapterError, "1 tensors would not be used")


@pytest.mark.parametrize("field", ["trainable_token_indices", "layer_replication", "r"])
def test_unknown_fields_are_refused(bases: dict[str, Path], adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]]})
    refuse(bases["llama"], adapter, UnsupportedError, f"the field '{field}'")


def test_the_name_of_the_adapter_is_left_out(bases: dict[str, Path], adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, rename={KEY: f"{KEY}.default"})
    streamconv.merge(bases["llama"], adapter, adapter.parent / "out")
    rows = tensors(adapter.parent / "out")["model.embed_tokens.weight"][[7, 0, 30]]
    assert torch.equal(rows, read_tensors(adapter / TENSORS)[f"{KEY}.default"])


def test_every_field_of_peft_is_known() -> None:
    known = set(ADAPTERS["TRAINABLE_TOKENS"].fields)
    assert {field.name for field in dataclasses.fields(TrainableTokensConfig)} <= known


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["tokens"]) == ("TRAINABLE_TOKENS", 3)
