"""Formats that transformers itself owns: DeepSeek's fp8 blocks and gpt-oss' mxfp4, with what it dequantizes them to.

    python tests/golden/make_transformers.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import FineGrainedFP8Config, GptOssConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss import GptOssForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
}
LEFT_ALONE = ["lm_head"]
GPT_OSS_LEFT_ALONE = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]


@dataclass(frozen=True)
class Quantizer:
    """What transformers' operations want of the quantizer that they belong to."""

    quantization_config: FineGrainedFP8Config


FP8_CASES = {
    "fp8_block": FineGrainedFP8Config(weight_block_size=(16, 32), modules_to_not_convert=LEFT_ALONE),
    "fp8_block_ue8m0": FineGrainedFP8Config(
        weight_block_size=(16, 32), modules_to_not_convert=LEFT_ALONE, scale_fmt="ue8m0"
    ),
}


def make_fp8(config: FineGrainedFP8Config, folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    mark(model)
    to_fp8, back = Fp8Quantize(Quantizer(config)), Fp8Dequantize(Quantizer(config))
    stored, expected = {}, {}
    for name, weight in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        made = to_fp8.convert({name: weight})
        stored |= made
        parts = {"weight": made[name], "weight_scale_inv": made[f"{name}_scale_inv"]}
        expected[name] = back.convert(parts, full_layer_name=name, model=model)[name]
    save(folder, model.config, json.loads(config.to_json_string(use_diff=False)), stored, expected)


def mark(model: LlamaForCausalLM) -> None:
    """Give weights what grids stumble over: zeros as far as a block goes, one great value, very small ones."""
    with torch.no_grad():
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        attention.k_proj.weight[3] = 0
        attention.q_proj.weight[:, :32] *= 2**-9
        mlp.up_proj.weight[5, 7] = 3.0
        mlp.gate_proj.weight[:16] = 0
        mlp.down_proj.weight[9] *= 2**-14


def make_mxfp4(folder: Path) -> None:
    """Every code, and exponents about those of real weights."""
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"])
    stored = dict(GptOssForCausalLM(config).to(torch.bfloat16).state_dict())
    expected = {}
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.layers.0.mlp.experts.{name}"
        count, columns, rows = stored.pop(path).shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(112, 124, (count, rows, columns // 32), dtype=torch.uint8)
        blocks[0, 0], scales[1, 1] = 0, 1
        stored |= {f"{path}_blocks": blocks, f"{path}_scales": scales}
        expected[path] = convert_moe_packed_tensors(blocks, scales)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": GPT_OSS_LEFT_ALONE}
    save(folder, config, quantization, stored, expected)


def save(
    folder: Path,
    config: Any,
    quantization: dict[str, Any],
    stored: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.bfloat16
    config.architectures = ["GptOssForCausalLM" if "Oss" in type(config).__name__ else "LlamaForCausalLM"]
    config.save_pretrained(folder)
    path = folder / "config.json"
    described = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    save_file(whole(stored), folder / "model.safetensors", {"format": "pt"})
    save_file(whole(expected), folder / "expected.safetensors")
    versions = {each: version(each) for each in ("torch", "transformers")}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n")


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    root = Path(sys.argv[1]) / f"transformers-{version('transformers')}"
    for case, how in FP8_CASES.items():
        make_fp8(how, root / case)
    make_mxfp4(root / "gpt_oss_mxfp4")
