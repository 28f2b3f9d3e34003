"""FP8 outputs opened by stock transformers on the CPU, and bases that the owners' libraries made."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from peft import LoraConfig
from torch import Tensor
from transformers import CompressedTensorsConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

import streamconv
from streamconv.formats import find_weights
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded
from tests.formats.test_fp8 import bytes_of
from tests.models import write_adapter
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import VOCABULARY, logits, read_tensors, save_adapter, save_base

GOLDEN = Path(__file__).parents[1] / "golden"
MADE = (
    *(f"compressed-tensors-0.20.0/fp8_{kind}" for kind in ("tensor", "channel", "channel_float16", "block")),
    "compressed-tensors-0.20.0/mxfp8a16",
    "modelopt-0.47.0/fp8",
    "transformers-5.23.0/fp8_block",
    "transformers-5.23.0/fp8_block_ue8m0",
)
every_made = pytest.mark.parametrize("name", MADE)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
OUTPUTS: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"quant": "fp8"},
    "fp8, searched": {"quant": "fp8", "rounding": "search"},
    "fp8 of float16": {"quant": "fp8", "dtype": "float16"},
    "fp8-block": {"quant": "fp8-block"},
    "fp8-block, at random": {"quant": "fp8-block", "rounding": "stochastic"},
}
every_output = pytest.mark.parametrize("name", OUTPUTS)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every output, and the merged model in 16 bit."""
    folder = tmp_path_factory.mktemp("merged")
    base = save_base(folder / "base", LlamaConfig(**SIZES, tie_word_embeddings=True), dtype=torch.bfloat16)
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapter = save_adapter(folder / "adapter", base, lora).path
    for name, options in {**OUTPUTS, "dense": {}}.items():
        streamconv.merge(base, adapter, folder / name, **options)
    return {name: folder / name for name in (*OUTPUTS, "dense")}


def opened(folder: Path) -> PreTrainedModel:
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    if method == "fp8":  # without a GPU it dequantizes by itself
        return open_model(folder, dtype="auto")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
        return open_model(folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto")


def linear(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}


@every_output
def test_transformers_dequantizes_to_the_same_bits(name: str, merged: dict[str, Path]) -> None:
    weights = {weight.name: weight for weight in find_weights(index_of(merged[name]))}
    model = opened(merged[name])
    quantized = 0
    for module, weight in linear(model).items():
        if module == "lm_head":
            continue
        assert torch.equal(weight.float(), decoded(weights[f"{module}.weight"]))
        quantized += weights[f"{module}.weight"].decoder.grid is not None
    assert quantized == 14
    dense = logits(open_model(merged["dense"], dtype="auto").float())
    assert logits_differ_by(model.float(), dense) < 0.3


@pytest.mark.parametrize("name", ["fp8", "fp8, searched", "fp8 of float16"])
def test_every_linear_module_is_quantized_or_ignored(name: str, merged: dict[str, Path]) -> None:
    """By the rules of compressed-tensors, on the model as transformers builds it."""
    config = json.loads((merged[name] / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    found = match_named_modules(opened(merged[name]), group["targets"], config["ignore"])
    stored = {
        key.removesuffix(".weight_scale") for key in tensors(merged[name]) if key.endswith("weight_scale")
    }
    assert {module for module, _ in found} == stored
    assert QuantizationConfig.model_validate(config).quantization_status == "compressed"


@pytest.mark.parametrize("quant", ["fp8", "fp8-block"])
def test_experts_that_are_stored_apart_are_quantized(quant: str, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, tie_word_embeddings=True
    )
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    streamconv.convert(base, tmp_path / "out", quant=quant)
    found = {weight.name: weight for weight in find_weights(index_of(tmp_path / "out"))}
    experts = [name for name in found if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert {found[name].format for name in experts} == {quant}
    assert found["model.layers.0.mlp.gate.weight"].format == "bfloat16"
    model = opened(tmp_path / "out")
    fused = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"]
    for number in range(4):
        ours = decoded(found[f"model.layers.0.mlp.experts.{number}.down_proj.weight"])
        assert torch.equal(fused[number].float(), ours)


# -- bases that the owners' libraries made -----------------------------------------------------------------------------


@every_made
def test_values_are_those_of_the_library_that_made_them(name: str) -> None:
    weights = {weight.name: weight for weight in find_weights(index_of(GOLDEN / name))}
    expected = read_tensors(GOLDEN / name / "expected.safetensors")
    for key, values in expected.items():
        found = weights[key]
        assert torch.equal(decoded(found), values.to(found.dtype.torch).float())
    assert len(expected) == 7


@every_made
def test_they_are_kept_to_the_byte(name: str, tmp_path: Path) -> None:
    base = GOLDEN / name
    before = read_tensors(base / "model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in before.items() if key.endswith("proj.weight")}
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("q_proj", "down_proj"), size=1e-30)
    streamconv.merge(base, adapter, tmp_path / "out", quant="keep", min_kept=0.0)
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert (after[key].dtype, bytes_of(after[key])) == (tensor.dtype, bytes_of(tensor))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
