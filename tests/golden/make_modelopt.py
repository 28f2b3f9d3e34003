"""Models that NVIDIA's modelopt itself has quantized and exported, with what it dequantizes them to.

    python tests/golden/make_modelopt.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "architectures": ["LlamaForCausalLM"],
}
CASES = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4a16": mtq.W4A16_NVFP4_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
}


def make(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    mark(model)
    mtq.quantize(model, CASES[name], forward_loop=observe)
    export_hf_checkpoint(model, export_dir=folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    stored = load_file(folder / "model.safetensors")
    modules = sorted(key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale"))
    expected = {f"{module}.weight": dequantized(stored, module) for module in modules}
    save_file(expected, folder / "expected.safetensors")
    versions = {each: version(each) for each in ("nvidia-modelopt", "torch", "transformers")}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n")


def mark(model: LlamaForCausalLM) -> None:
    """Give weights what grids stumble over: zeros as far as a group goes, one great value, very small ones."""
    with torch.no_grad():
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        attention.k_proj.weight[3] = 0
        attention.q_proj.weight[:, :32] *= 2**-9
        mlp.up_proj.weight[5, 7] = 3.0
        mlp.gate_proj.weight[:16] = 0
        mlp.down_proj.weight[9] *= 2**-14


def observe(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model(torch.arange(14).view(2, 7))


def dequantized(stored: dict[str, Tensor], module: str) -> Tensor:
    """[out, in], float32."""
    codes, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
    if codes.dtype == torch.uint8:
        shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
        double = stored[f"{module}.weight_scale_2"]
        packed = NVFP4QTensor(shape, torch.float32, codes)
        whole: Tensor = packed.dequantize(
            torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16}
        )
    else:
        whole = FP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    return whole.contiguous()


if __name__ == "__main__":
    for case in CASES:
        make(case, Path(sys.argv[1]) / f"modelopt-{version('nvidia-modelopt')}" / case)
