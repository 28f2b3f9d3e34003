"""Experts of gpt-oss in GGUF files: taken apart one by one, turned, gate and up no longer interleaved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.pipeline import build_job, prepare
from tests.gguf.bases import fast_tokenizer, read_file, read_tensors
from tests.models import write_tensors
from tests.tiny import read_tensors as read_safetensors

EXPERTS, HIDDEN, INNER, LAYER = 3, 64, 96, "model.layers.0."
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 290,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    attention = {
        f"self_attn.{name}_proj.weight": (rows, HIDDEN) for name, rows in (("q", 64), ("k", 32), ("v", 32))
    }
    layer: dict[str, tuple[int, ...]] = {
        **attention,
        **{name.replace("weight", "bias"): shape[:1] for name, shape in attention.items()},
        "self_attn.o_proj.weight": (HIDDEN, 64),
        "self_attn.o_proj.bias": (HIDDEN,),
        "self_attn.sinks": (4,),
        "mlp.router.weight": (EXPERTS, HIDDEN),
        "mlp.router.bias": (EXPERTS,),
        "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INNER),
        "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    ends = {
        "model.embed_tokens.weight": (290, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (290, HIDDEN),
    }
    return {**ends, **{LAYER + name: shape for name, shape in layer.items()}}


def write(folder: Path, experts: dict[str, Tensor], **config: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes().items()}
    write_tensors(
        folder, tensors | {LAYER + name: each for name, each in experts.items()}, CONFIG | config, 1
    )
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    return folder


def dense() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    return {
        f"mlp.experts.{name}": torch.randn(EXPERTS, *size, generator=generator).bfloat16()
        for name, size in sizes.items()
    }


def blocks() -> dict[str, Tensor]:
    """Experts as OpenAI stores them, [experts, out, blocks of in, codes]."""
    generator = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}
    for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        codes = torch.randint(256, (EXPERTS, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(
            120, 128, (EXPERTS, rows, columns // 32), generator=generator, dtype=torch.uint8
        )
        found |= {f"mlp.experts.{name}_blocks": codes, f"mlp.experts.{name}_scales": scales}
    return found


def expected(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model in one safetensors file, in the words of llama.cpp's converter."""
    found = read_safetensors(folder / "model.safetensors")
    experts = {name: found[f"{LAYER}mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")}
    gate_up, bias = experts["gate_up_proj"].transpose(-1, -2), found[f"{LAYER}mlp.experts.gate_up_proj_bias"]
    return {
        "blk.0.ffn_gate_exps.weight": gate_up[:, ::2, :].half(),
        "blk.0.ffn_up_exps.weight": gate_up[:, 1::2, :].half(),
        "blk.0.ffn_down_exps.weight": experts["down_proj"].transpose(-1, -2).half(),
        "blk.0.ffn_gate_exps.bias": bias[..., ::2].float(),
        "blk.0.ffn_up_exps.bias": bias[..., 1::2].float(),
        "blk.0.ffn_down_exps.bias": found[f"{LAYER}mlp.experts.down_proj_bias"].float(),
        "blk.0.attn_sinks.weight": found[f"{LAYER}self_attn.sinks"].float(),
        "blk.0.ffn_gate_inp.weight": found[f"{LAYER}mlp.router.weight"].float(),
        "blk.0.attn_q.weight": found[f"{LAYER}self_attn.q_proj.weight"].half(),
    }


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_dense_experts(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    streamconv.convert(base, tmp_path / "out", quant="gguf:f16", device="cpu")
    check(read_tensors(tmp_path / "out"), expected(base))
    pairs = read_file(tmp_path / "out").pairs
    assert (pairs["gpt-oss.expert_count"], pairs["gpt-oss.expert_used_count"]) == (EXPERTS, 2)


def test_experts_in_mxfp4_are_those_that_they_decode_to(tmp_path: Path) -> None:
    base = write(tmp_path / "base", blocks(), quantization_config={"quant_method": "mxfp4"})
    streamconv.convert(base, tmp_path / "dense", quant="none", device="cpu")
    streamconv.convert(base, tmp_path / "out", quant="gguf:f16", device="cpu")
    check(read_tensors(tmp_path / "out"), expected(tmp_path / "dense"))
    streamconv.verify(tmp_path / "out", full=True, base=base, device="cpu")


def test_an_update_of_all_experts_reaches_each(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key, generator = f"base_model.model.{LAYER}mlp.experts", torch.Generator().manual_seed(3)
    factors = {"lora_A.weight": (2 * EXPERTS, HIDDEN), "lora_B.weight": (2 * INNER, 2 * EXPERTS)}
    tensors = {f"{key}.{name}": torch.randn(shape, generator=generator) for name, shape in factors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": []}
    config |= {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.21.0"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    streamconv.merge(base, adapter, tmp_path / "dense", quant="float32", max_shard_size="1GB", device="cpu")
    streamconv.merge(base, adapter, tmp_path / "out", quant="gguf:f16", device="cpu")
    assert not torch.equal(
        expected(tmp_path / "dense")["blk.0.ffn_up_exps.weight"], expected(base)["blk.0.ffn_up_exps.weight"]
    )
    check(read_tensors(tmp_path / "out"), expected(tmp_path / "dense"))


def test_what_is_held_of_experts_is_that_of_one(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    (shard,) = prepare(build_job(base, quant="gguf:f16", device="cpu")).plan.shards
    steps = [placed.step for placed in shard.steps if placed.step.specs[0].name == "blk.0.ffn_up_exps.weight"]
    assert [step.specs[0].shape for step in steps] == [(1, INNER, HIDDEN)] * EXPERTS
