"""w4a16 and w8a16 results through the public API, opened by stock transformers with compressed-tensors on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import CompressedTensorsConfig, LlamaConfig, PreTrainedModel

import streamconv
from streamconv.formats import find_weights
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded
from tests.parity.opening import logits_differ_by, open_model
from tests.tiny import VOCABULARY, logits, save_adapter, save_base

# Rows of 160 are whole groups of 32 and not of 64: with these, down_proj stays in 16 bit.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
TARGETS = ("q_proj", "v_proj", "down_proj")
OUTPUTS: Mapping[str, Mapping[str, Any]] = {
    "w4a16 in 32": {"quant": "w4a16", "group_size": 32},
    "w4a16 in 64": {"quant": "w4a16", "group_size": 64, "rounding": "search"},
    "w8a16 in 64": {"quant": "w8a16", "group_size": 64, "rounding": "stochastic"},
    "w8a16 of float16": {"quant": "w8a16", "group_size": 32, "dtype": "float16"},
}
every_output = pytest.mark.parametrize("name", OUTPUTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return save_base(folder, LlamaConfig(**SIZES, tie_word_embeddings=True), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return save_adapter(tmp_path_factory.mktemp("adapter"), base, lora).path


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every output, and the merged model in 16 bit."""
    folder = tmp_path_factory.mktemp("merged")
    for name, options in {**OUTPUTS, "dense": {}}.items():
        streamconv.merge(base, adapter, folder / name, **options)
    return {name: folder / name for name in (*OUTPUTS, "dense")}


def dequantized(folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        # It says that the model's config holds, but for how it is loaded: what is asked for.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
        return open_model(folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto")


def linear(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}


@every_output
def test_the_library_dequantizes_to_the_same_bits(name: str, merged: dict[str, Path]) -> None:
    weights = {weight.name: weight for weight in find_weights(index_of(merged[name]))}
    model = dequantized(merged[name])
    quantized = 0
    for module, weight in linear(model).items():
        if module == "lm_head":
            continue
        ours = weights[f"{module}.weight"]
        assert torch.equal(weight.float(), decoded(ours))
        quantized += ours.decoder.grid is not None
    assert quantized == (14 if OUTPUTS[name]["group_size"] == 32 else 12)


@every_output
def test_the_stock_loader_runs_what_is_packed(name: str, merged: dict[str, Path]) -> None:
    model = open_model(merged[name], dtype="auto")
    found = logits(model)
    assert bool(found.isfinite().all())
    assert torch.equal(found, logits(dequantized(merged[name])))
    dense = logits(open_model(merged["dense"], dtype="auto"))
    assert logits_differ_by(model, dense) < (0.4 if "w4" in name else 0.03)
