"""Models that compressed-tensors itself has quantized, packed and described, with what it dequantizes them to.

    python tests/golden/make_compressed_tensors.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
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
_BY_32 = {"num_bits": 4, "strategy": "group", "group_size": 32}


@dataclass(frozen=True)
class Case:
    """`scheme`: a preset's name, or what is said of the weights; `changes` are made to the weights of either.

    `inputs` is what is said of activations.
    """

    scheme: str | Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16
    ignore: Sequence[str] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None
    intermediate_size: int = 32
    is_marked: bool = True  # has values that grids stumble over: see `mark`


def _old(scheme: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, ignore: Sequence[str] = ()) -> Case:
    return Case(scheme, dtype, ignore, intermediate_size=96, is_marked=False)


CASES = {
    "w4a16": _old(_BY_32, ignore=["re:.*q_proj$"]),
    "w8a16": _old({**_BY_32, "num_bits": 8}, torch.float16),
    "w4a16_rows": _old({"num_bits": 4, "strategy": "channel"}),
    "w4a16_asym": Case({**_BY_32, "symmetric": False}),
    "w8a16_asym_rows": Case({"num_bits": 8, "strategy": "channel", "symmetric": False}, torch.float16),
    "w8a8": Case("W8A8"),
    "w8a8_tensor": Case(
        {"num_bits": 8, "strategy": "tensor"}, inputs={"num_bits": 8, "strategy": "tensor", "dynamic": False}
    ),
    "w8a8_static_asym": Case(
        {"num_bits": 8, "strategy": "channel"},
        torch.float16,
        inputs={"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": False},
    ),
    "w8a8_asym_weights": Case(
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        inputs={"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "fp8_tensor": Case("FP8"),
    "fp8_channel": Case("FP8_DYNAMIC"),
    "fp8_channel_float16": Case("FP8_DYNAMIC", torch.float16),
    "fp8_block": Case("FP8_BLOCK", changes={"block_structure": [24, 32]}),
    "nvfp4": Case("NVFP4"),
    "nvfp4a16": Case("NVFP4A16"),
    "mxfp4": Case("MXFP4"),
    "mxfp4a16": Case("MXFP4A16"),
    "mxfp8a16": Case("MXFP8A16"),
}


def make(name: str, folder: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": case.intermediate_size})).to(
        case.dtype
    )
    if case.is_marked:
        mark(model)
    apply_quantization_config(model, quantization(case))
    quantized = {name: each for name, each in model.named_modules() if hasattr(each, "quantization_scheme")}
    for module in quantized.values():
        observe(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    expected = {f"{name}.weight": decompressed(module) for name, module in quantized.items()}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = case.dtype
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    compressor.update_config(str(folder))
    save_file(whole(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    save_file(whole(expected), folder / "expected.safetensors")
    versions = {each.__name__: each.__version__ for each in (compressed_tensors, torch, transformers)}
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


def quantization(case: Case) -> QuantizationConfig:
    if isinstance(case.scheme, str):
        scheme = preset_name_to_scheme(case.scheme, ["Linear"]).model_dump()
    else:
        scheme = {"targets": ["Linear"], "weights": dict(case.scheme)}
    scheme["weights"] |= case.changes
    if case.inputs is not None:
        scheme["input_activations"] = dict(case.inputs)
    return QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head", *case.ignore],
        quantization_status="frozen",
    )


def observe(module: Any) -> None:
    """Scales by the least and the greatest value of every group, as an observer would have them.

    Partners share no global scale here; those of activations are numbers that tell one from another.
    """
    args, weight = module.quantization_scheme.weights, module.weight
    blocks, shape = in_blocks(weight, args)
    overall = None
    if args.strategy == "tensor_group":
        overall = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data.copy_(overall)
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=overall)
    module.weight_scale.data.copy_(scale.view(shape))
    if not args.symmetric:
        module.weight_zero_point.data.copy_(zero_point.view(shape))
    for number, name in enumerate(("input_scale", "input_global_scale", "input_zero_point"), 1):
        if hasattr(module, name):
            getattr(module, name).data.fill_(number + weight.shape[0] / 256)


def in_blocks(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, tuple[int, ...]]:
    """Return what has one scale, along the last axis, and the shape of the scales."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, -1), (1,)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        cells = padded.view(padded.shape[0] // height, height, columns // width, width)
        return cells.transpose(1, 2).flatten(2), (padded.shape[0] // height, columns // width)
    size = args.group_size or columns
    return weight.view(rows, columns // size, size), (rows, columns // size)


def decompressed(module: Any) -> Tensor:
    packing = BaseCompressor.get_value_from_registry(module.quantization_scheme.format.value)
    whole: Tensor = packing.decompress(dict(module.state_dict()), module.quantization_scheme)["weight"]
    return whole.detach()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    for case in CASES:
        make(case, Path(sys.argv[1]) / "compressed-tensors-0.20.0" / case)
