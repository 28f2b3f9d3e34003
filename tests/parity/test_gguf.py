"""GGUF files opened by transformers' own reader: the model that PEFT has, of every architecture that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import streamconv
from streamconv.gguf.architecture import ARCHITECTURES
from tests.gguf.bases import fast_tokenizer
from tests.parity.opening import tensors
from tests.tiny import load_base, logits, save_adapter, save_base

SIZES: dict[str, Any] = {
    "vocab_size": 290,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "gemma2": Gemma2Config(**GEMMA | {"tie_word_embeddings": True}),
    "gemma3": Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 7}),
    "phi3": Phi3Config(**SIZES, pad_token_id=2),
}
# transformers' reader puts gpt-oss together otherwise than llama.cpp.
GPT_OSS = GptOssConfig(
    **SIZES | {"intermediate_size": 96},
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=32,
)
# What transformers' reader cannot open, it opens as another that computes the same.
OPENED_AS = {"mistral": "llama"}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
EXPERTS = ["q_proj", "k_proj", "o_proj"]
TARGETS = {"phi3": FUSED, "qwen3moe": EXPERTS}
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def save_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def open_gguf(folder: Path, name: str) -> torch.nn.Module:
    """transformers' own model; its config is given, as its reader leaves fields of headers out."""
    given = CONFIGS[name].to_dict()
    config = LlamaConfig(**{key: given[key] for key in SIZES}) if name in OPENED_AS else CONFIGS[name]
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model-F16.gguf", config=config, dtype=torch.float32
    )
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model_that_was_trained(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base", CONFIGS[name])
    save_tokenizer(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, USUAL))
    adapter = save_adapter(tmp_path / "adapter", base, config)
    streamconv.merge(base, adapter.path, tmp_path / "out", quant="gguf:f16", device="cpu")
    found, expected = logits(open_gguf(tmp_path / "out", name)), adapter.logits()
    # Rounding to float16 alone, in up to seven layers; a row out of place gives more than the spread.
    assert (found - expected).abs().max() < 0.04 * expected.std()
    streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter.path, device="cpu")


def test_every_architecture_has_its_case() -> None:
    classes = {
        type(config).__name__.removesuffix("Config").removesuffix("Text") for config in CONFIGS.values()
    }
    # How the tensors of gpt-oss are written: planning/test_gguf_pieces.py, and tests/foreign/test_llamacpp.py.
    assert classes | {"GptOss"} == {name.removesuffix("ForCausalLM") for name in ARCHITECTURES}


@pytest.mark.parametrize("name", [*CONFIGS, "gpt-oss"])
def test_a_file_is_read_back_as_the_model_that_it_was_made_of(tmp_path: Path, name: str) -> None:
    """With nothing but the file: names and values of all tensors, and a config with which transformers computes it."""
    config = CONFIGS.get(name, GPT_OSS)
    given = config.to_dict()
    if name == "llama":  # other numbers of which the same factors could be made are refused
        given["rope_parameters"] = LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    base = save_base(tmp_path / "base", type(config)(**given), dtype=torch.bfloat16)
    save_tokenizer(base)
    streamconv.convert(base, tmp_path / "gguf", quant="gguf:bf16", device="cpu")
    file = next((tmp_path / "gguf").glob("*.gguf"))
    streamconv.convert(file, tmp_path / "back", quant="none", device="cpu")
    found, expected = tensors(tmp_path / "back"), tensors(base)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == torch.bfloat16, key
    assert torch.equal(logits(load_base(tmp_path / "back")), logits(load_base(base)))
