"""Models that compressed-tensors itself has quantized, packed and described, with what it dequantizes them to.

    python tests/golden/make_compressed_tensors.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
}
# What is said of the weights, the type of the model, and modules left alone beside the head.
CASES: dict[str, tuple[dict[str, Any], torch.dtype, list[str]]] = {
    "w4a16": ({"num_bits": 4, "strategy": "group", "group_size": 32}, torch.bfloat16, ["re:.*q_proj$"]),
    "w8a16": ({"num_bits": 8, "strategy": "group", "group_size": 32}, torch.float16, []),
    "w4a16_rows": ({"num_bits": 4, "strategy": "channel"}, torch.bfloat16, []),
}


def make(name: str, folder: Path) -> None:
    weights, dtype, ignore = CASES[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    group = {"targets": ["Linear"], "weights": weights}
    config = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=["lm_head", *ignore],
        format="pack-quantized",
        quantization_status="frozen",
    )
    apply_quantization_config(model, config)
    quantized = {name: each for name, each in model.named_modules() if hasattr(each, "quantization_scheme")}
    for module in quantized.values():
        observe(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    expected = {
        f"{name}.weight": PackedQuantizationCompressor.decompress(
            dict(module.state_dict()), module.quantization_scheme
        )["weight"].detach()
        for name, module in quantized.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    compressor.update_config(str(folder))
    save_file(whole(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    save_file(whole(expected), folder / "expected.safetensors")
    versions = {each.__name__: each.__version__ for each in (compressed_tensors, torch, transformers)}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n")


def observe(module: Any) -> None:
    """Scales by the least and the greatest value of every group, as an observer would have them."""
    args = module.quantization_scheme.weights
    groups = module.weight.view(module.weight.shape[0], -1, args.group_size or module.weight.shape[1])
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    module.weight_scale.data.copy_(scale)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    for case in CASES:
        make(case, Path(sys.argv[1]) / "compressed-tensors-0.20.0" / case)
