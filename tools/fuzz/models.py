"""Tiny models that targets change a file of: dense, and one for each quantized format that is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.checkpoint.container import SAFETENSORS
from streamconv.formats import FORMATS, container_of
from streamconv.formats.gguf import PREFIX
from tests.gguf.bases import write_llama
from tests.models import Sizes

SHARD = "model.safetensors"
HIDDEN, INNER, VOCABULARY = 128, 256, 64
IN_GGUF: Mapping[str, Sizes] = {
    "f16": Sizes(hidden=64, inner=128, layers=1, vocabulary=300),
    "q8_0": Sizes(hidden=64, inner=128, layers=1, vocabulary=300),
    "q4_k": Sizes(hidden=256, inner=256, layers=1, vocabulary=300),
}
"""Types of numbers, of blocks, and of blocks in a block; of rows so short that a fuzzer holds the data."""
_MLP = "model.layers.0.mlp"
_MATRIX = f"{_MLP}.up_proj"
_EXPERTS = f"{_MLP}.experts.gate_up_proj"
QUANTIZED = tuple(
    name
    for name, each in FORMATS.items()
    if name not in ("float32", "float16", "bfloat16") and container_of(each) == SAFETENSORS
)

Parts = dict[str, Tensor]


def write_base(folder: Path, shards: int = 1) -> Path:
    """A bfloat16 Llama of one layer, in one file or in two with an index."""
    chance = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"{_MLP}.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")},
        f"{_MLP}.down_proj.weight": (HIDDEN, INNER),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    tensors = {
        name: (0.05 * torch.randn(shape, generator=chance)).bfloat16() for name, shape in shapes.items()
    }
    _save(folder, tensors, {}, shards)
    _date(folder)
    return folder


def write_adapter(folder: Path) -> Path:
    """A LoRA of rank 2 on two modules of that Llama."""
    chance = torch.Generator().manual_seed(1)
    modules = {f"base_model.model.{_MATRIX}": (INNER, HIDDEN)}
    modules["base_model.model.model.layers.0.self_attn.q_proj"] = (HIDDEN, HIDDEN)
    tensors = {}
    for name, (rows, columns) in modules.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=chance)
        tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(rows, 2, generator=chance)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    _date(folder)
    return folder


def write_quantized(folder: Path, name: str, base: Path) -> Path:
    """The base in a format that is written, or one weight in a storage that is only read, or kept."""
    if name in QUANTIZED:
        streamconv.convert(base=base, out=folder, quant=name, card=False, overwrite=True)
        return folder
    tensors, config = READ_ONLY[name]()
    _save(folder, {**tensors, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}, config, 1)
    return folder


def write_gguf(folder: Path, name: str) -> Path:
    """The file of a Llama of one layer with its tokenizer, in one of the formats of GGUF."""
    dense = folder / "dense"
    write_llama(dense, IN_GGUF[name], shards=1)
    _date(dense)
    streamconv.convert(base=dense, out=folder / "base", quant=f"{PREFIX}{name}", card=False)
    (file,) = (folder / "base").glob("*.gguf")
    return file


def _date(folder: Path) -> None:
    """Give all files the same time, as what is made of them holds it and is to be the same in every process."""
    for path in folder.iterdir():
        os.utime(path, (0, 0))


def _save(folder: Path, tensors: Parts, config: Mapping[str, Any], shards: int) -> None:
    folder.mkdir(parents=True)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(described))
    if shards == 1:
        save_file(tensors, folder / SHARD, {"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _codes(*shape: int, dtype: torch.dtype = torch.uint8, least: int = 0, most: int = 256) -> Tensor:
    return torch.randint(least, most, shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.01 + 1e-3


def _compressed(layout: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": layout,
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
    }


def _fp8_tensor() -> tuple[Parts, dict[str, Any]]:
    parts = {
        f"{_MATRIX}.weight": torch.randn(INNER, HIDDEN).to(torch.float8_e4m3fn),
        f"{_MATRIX}.weight_scale": _scales(1).bfloat16(),
        f"{_MATRIX}.input_scale": _scales(1).bfloat16(),
    }
    return parts, _compressed("float-quantized", {"num_bits": 8, "strategy": "tensor"})


def _fp8_exponents() -> tuple[Parts, dict[str, Any]]:
    parts = {
        f"{_MATRIX}.weight": torch.randn(INNER, HIDDEN).to(torch.float8_e4m3fn),
        f"{_MATRIX}.weight_scale_inv": _scales(-(-INNER // 48), -(-HIDDEN // 20)).to(torch.float8_e8m0fnu),
    }
    settings = {"quant_method": "fp8", "weight_block_size": [48, 20], "scale_fmt": "ue8m0"}
    return parts, {"quantization_config": settings}


def _nvfp4() -> tuple[Parts, dict[str, Any]]:
    parts = {
        f"{_MATRIX}.weight_packed": _codes(INNER, HIDDEN // 2),
        f"{_MATRIX}.weight_scale": (_scales(INNER, HIDDEN // 16) * 100).to(torch.float8_e4m3fn),
        f"{_MATRIX}.weight_global_scale": torch.tensor([1234.5]),
    }
    weights = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    return parts, _compressed("nvfp4-pack-quantized", weights)


def _mxfp4() -> tuple[Parts, dict[str, Any]]:
    parts = {
        f"{_MATRIX}.weight_packed": _codes(INNER, HIDDEN // 2),
        f"{_MATRIX}.weight_scale": _codes(INNER, HIDDEN // 32, least=110, most=125),
    }
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return parts, _compressed("mxfp4-pack-quantized", weights)


def _mlx() -> tuple[Parts, dict[str, Any]]:
    parts = {
        f"{_MATRIX}.weight": _codes(INNER, HIDDEN // 8, dtype=torch.int64, most=2**32).to(torch.uint32),
        f"{_MATRIX}.scales": _scales(INNER, HIDDEN // 64).bfloat16(),
        f"{_MATRIX}.biases": _scales(INNER, HIDDEN // 64).bfloat16(),
    }
    return parts, {"quantization": {"group_size": 64, "bits": 4}}


def _gpt_oss() -> tuple[Parts, dict[str, Any]]:
    parts = {
        f"{_EXPERTS}_blocks": _codes(2, 64, HIDDEN // 32, 16),
        f"{_EXPERTS}_scales": _codes(2, 64, HIDDEN // 32, least=115, most=130),
    }
    return parts, {"quantization_config": {"quant_method": "mxfp4"}}


READ_ONLY: Mapping[str, Callable[[], tuple[Parts, dict[str, Any]]]] = {
    "fp8-tensor": _fp8_tensor,
    "fp8-exponents": _fp8_exponents,
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "mlx": _mlx,
    "gpt-oss": _gpt_oss,
}
