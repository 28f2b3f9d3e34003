"""Checkpoints of foreign formats, made by hand in the layout of their libraries: random codes beside dense weights.

Attention, embeddings and norms are bfloat16, the MLP's weights are of the format. Bytes of scales are positive numbers;
those of codes are anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamconv.dtypes import DTYPES, PACKED
from tests.models import SHARD, Sizes

SIZES = Sizes(hidden=64, inner=128, layers=2, vocabulary=40)
PLAIN = {"format": "pt"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type and shape by name, below the module or, with a dot before, beside it."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A format: the tensors of a weight [out, in], the settings in config.json, and what else there is of it.

    `others` are tensors of the whole model, `metadata` makes that of a file of the weights in it, `files` lie beside.
    """

    tensors: Callable[[int, int], Tensors]
    config: Mapping[str, Any]
    others: Tensors = field(default_factory=dict)
    metadata: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: PLAIN
    files: Mapping[str, str] = field(default_factory=dict)


def packed(bits: int, **settings: Any) -> Mapping[str, Any]:
    """Settings of compressed-tensors' pack-quantized."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, **settings}
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quantization_config": {**COMPRESSED, "format": "pack-quantized", "config_groups": {"group_0": group}}
    }


def fp4(format_name: str) -> Mapping[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quantization_config": {**COMPRESSED, "format": format_name, "config_groups": {"group_0": group}}}


def mlx(bits: int, mode: str = "affine", group: int = 32) -> Mapping[str, Any]:
    settings = {"group_size": group, "bits": bits, **({"mode": mode} if mode != "affine" else {})}
    return {"quantization": settings, "quantization_config": settings}


def method(name: str, **settings: Any) -> Mapping[str, Any]:
    return {"quantization_config": {"quant_method": name, **settings}}


def torchao_metadata(names: Iterable[str]) -> Mapping[str, str]:
    weights = sorted({name.replace("._weight_qdata", ".weight") for name in names if "_weight_qdata" in name})
    kind = {"_type": "Int4Tensor", "_data": {"block_size": [1, 32], "shape": [128, 64]}}
    told = {name: json.dumps(kind) for name in weights}
    return {**PLAIN, **told, "tensor_names": json.dumps(weights)}


def hqq(rows: int, columns: int) -> Tensors:
    scalars = ("nbits", "group_size", "axis", "packing", "view_as_float", "offload_meta")
    return {
        "W_q": ("U8", (rows * columns // 2 // 64, 64)),
        "scale": ("BF16", (rows * columns // 64, 1)),
        "zero": ("BF16", (rows * columns // 64, 1)),
        "shape": ("I64", (2,)),
        **dict.fromkeys(scalars, ("I32", ())),
    }


FP8 = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FOREIGN: Mapping[str, Foreign] = {
    "deepseek fp8": Foreign(
        lambda rows, columns: {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("F32", (1, 1))},
        method("fp8", **FP8),
    ),
    "deepseek ue8m0": Foreign(
        lambda rows, columns: {
            "weight": ("F8_E4M3", (rows, columns)),
            "weight_scale_inv": ("F8_E8M0", (1, 1)),
        },
        method("fp8", scale_fmt="ue8m0", **FP8),
    ),
    "deepseek fp4 experts": Foreign(
        lambda rows, columns: {
            "weight": ("I8", (rows, columns // 2)),
            "weight_scale_inv": ("F8_E8M0", (rows, columns // 32)),
        },
        {**method("fp8", scale_fmt="ue8m0", **FP8), "expert_dtype": "fp4"},
    ),
    "deepseek fp4 experts, scale": Foreign(
        lambda rows, columns: {
            "weight": ("I8", (rows, columns // 2)),
            "scale": ("F8_E8M0", (rows, columns // 32)),
        },
        {**method("fp8", scale_fmt="ue8m0", **FP8), "expert_dtype": "fp4"},
    ),
    "kimi int4, asymmetric": Foreign(
        lambda rows, columns: {
            "weight_packed": ("I32", (rows, columns // 8)),
            "weight_scale": ("BF16", (rows, columns // 32)),
            "weight_zero_point": ("I32", (rows // 8, columns // 32)),
            "weight_shape": ("I64", (2,)),
        },
        {"text_config": {"model_type": "llama", **packed(4, symmetric=False)}},
    ),
    "kimi int4, act order": Foreign(
        lambda rows, columns: {
            "weight_packed": ("I32", (rows, columns // 8)),
            "weight_scale": ("BF16", (rows, columns // 32)),
            "weight_g_idx": ("I32", (columns,)),
            "weight_shape": ("I64", (2,)),
        },
        packed(4, symmetric=True, actorder="group"),
    ),
    "int4 of symmetric settings with zero points": Foreign(
        lambda rows, columns: {
            "weight_packed": ("I32", (rows, columns // 8)),
            "weight_scale": ("BF16", (rows, columns // 32)),
            "weight_zero_point": ("I32", (rows // 8, columns // 32)),
            "weight_shape": ("I64", (2,)),
        },
        packed(4, symmetric=True),
    ),
    "gpt-oss mxfp4": Foreign(
        lambda rows, columns: {},
        method("mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]),
        {
            "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (2, 32, 2, 16)),
            "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (2, 32, 2)),
            "model.layers.0.mlp.experts.gate_up_proj_bias": ("BF16", (2, 32)),
        },
    ),
    "fp8, fused experts": Foreign(
        lambda rows, columns: {},
        method("fp8", **FP8, modules_to_not_convert=["self_attn"]),
        {
            "model.layers.0.mlp.experts.gate_up_proj": ("F8_E4M3", (2, 64, 256)),
            "model.layers.0.mlp.experts.gate_up_proj_scale_inv": ("BF16", (2, 1, 2)),
            "model.layers.0.mlp.experts.down_proj": ("F8_E4M3", (2, 128, 64)),
            "model.layers.0.mlp.experts.down_proj_scale_inv": ("BF16", (2, 1, 1)),
        },
    ),
    "nvfp4": Foreign(
        lambda rows, columns: {
            "weight_packed": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_global_scale": ("F32", (1,)),
            "input_global_scale": ("F32", (1,)),
        },
        fp4("nvfp4-pack-quantized"),
        files={"recipe.yaml": "default_stage: {}\n"},
    ),
    "nvfp4 of modelopt": Foreign(
        lambda rows, columns: {
            "weight": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ()),
        },
        method("modelopt", quant_algo="NVFP4", kv_cache_scheme={"num_bits": 8, "type": "float"}),
        {
            f"model.layers.{n}.self_attn.{kind}_proj.{kind}_scale": ("F32", ())
            for n in (0, 1)
            for kind in "kv"
        },
        files={
            "hf_quant_config.json": '{"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}'
        },
    ),
    "mxfp8": Foreign(
        lambda rows, columns: {
            "weight": ("F8_E4M3", (rows, columns)),
            "weight_scale": ("U8", (rows, columns // 32)),
        },
        fp4("mxfp8-quantized"),
    ),
    "w8a8": Foreign(
        lambda rows, columns: {"weight": ("I8", (rows, columns)), "weight_scale": ("BF16", (rows, 1))},
        fp4("int-quantized"),
    ),
    "torchao": Foreign(
        lambda rows, columns: {
            "_weight_qdata": ("I8", (rows, columns // 2)),
            "_weight_scale": ("BF16", (columns // 32, rows)),
            "_weight_zero_point": ("BF16", (columns // 32, rows)),
        },
        method("torchao", quant_type={"default": {"_type": "Int4WeightOnlyConfig"}}),
        metadata=torchao_metadata,
    ),
    "hqq": Foreign(hqq, method("hqq", quant_config={"weight_quant_params": {"nbits": 4}})),
    "mlx, 3 bit": Foreign(
        lambda rows, columns: {
            "weight": ("U32", (rows, columns * 3 // 32)),
            "scales": ("BF16", (rows, columns // 32)),
            "biases": ("BF16", (rows, columns // 32)),
        },
        mlx(3),
        metadata=lambda names: {"format": "mlx"},
    ),
    "mlx, 6 bit": Foreign(
        lambda rows, columns: {
            "weight": ("U32", (rows, columns * 6 // 32)),
            "scales": ("BF16", (rows, columns // 32)),
            "biases": ("BF16", (rows, columns // 32)),
        },
        mlx(6),
        metadata=lambda names: {"format": "mlx"},
    ),
    "mlx mxfp8": Foreign(
        lambda rows, columns: {
            "weight": ("U32", (rows, columns // 4)),
            "scales": ("U8", (rows, columns // 32)),
        },
        mlx(8, "mxfp8"),
        metadata=lambda names: {"format": "mlx"},
    ),
    "quanto": Foreign(
        lambda rows, columns: {
            "weight._data": ("I8", (rows, columns)),
            "weight._scale": ("BF16", (rows, 1)),
            "input_scale": ("BF16", ()),
            "output_scale": ("BF16", ()),
        },
        method("quanto", weights="int8"),
        files={"quanto_qmap.json": "{}"},
    ),
    "eetq": Foreign(
        lambda rows, columns: {"weight": ("I8", (columns, rows)), "weight_scales": ("F16", (rows,))},
        method("eetq", weights="int8"),
    ),
    "aqlm": Foreign(
        lambda rows, columns: {
            "codes": ("I16", (rows, columns // 8, 1)),
            "codebooks": ("F16", (1, 256, 1, 8)),
            "scales": ("F16", (rows, 1, 1, 1)),
        },
        method("aqlm", in_group_size=8, nbits_per_codebook=16),
    ),
    "spqr": Foreign(
        lambda rows, columns: {
            "dense_weights": ("I64", (rows * columns // 16,)),
            "row_offsets": ("I32", (rows + 1,)),
            "col_vals": ("I32", (5,)),
            "in_perm": ("I16", (columns,)),
        },
        method("spqr", bits=3, beta1=16, beta2=16),
    ),
    "vptq": Foreign(
        lambda rows, columns: {
            "indices": ("I32", (1, rows, columns // 8)),
            "centroids.weight": ("BF16", (1, 256 * 8)),
            "weight_scale": ("BF16", (columns,)),
            "weight_bias": ("BF16", (columns,)),
            "perm": ("U16", (columns,)),
        },
        method("vptq", config_for_layers={}),
    ),
    "bitnet": Foreign(
        lambda rows, columns: {"weight": ("U8", (rows // 4, columns)), "weight_scale": ("BF16", (1,))},
        method("bitnet", linear_class="bitlinear", quantization_mode="offline"),
    ),
    "higgs": Foreign(
        lambda rows, columns: {
            "weight": ("U8", (rows, columns // 2)),
            "scales": ("F16", (rows, columns // 32)),
            "tables": ("F16", (256, 2)),
            "tables2": ("F16", (256, 2)),
        },
        method("higgs", bits=4, p=2),
    ),
    "gptq, 3 bit": Foreign(
        lambda rows, columns: {
            "qweight": ("I32", (columns * 3 // 32, rows)),
            "qzeros": ("I32", (columns // 32, rows * 3 // 32)),
            "scales": ("F16", (columns // 32, rows)),
            "g_idx": ("I32", (columns,)),
        },
        method("gptq", bits=3, group_size=32),
        files={"quantize_config.json": '{"bits": 3}', "quant_log.csv": "layer,loss\n"},
    ),
    "deepseek fp8 beside fp4": Foreign(
        lambda rows, columns: (
            {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("F32", (1, 1))}
            if rows > columns
            else {
                "weight": ("I8", (rows, columns // 2)),
                "weight_scale_inv": ("F8_E8M0", (rows, columns // 32)),
            }
        ),
        {**method("fp8", **FP8), "expert_dtype": "fp4"},
    ),
    "of no known method, with every type": Foreign(
        lambda rows, columns: {
            "codes": ("F4", (rows, columns)),
            "six": ("F6_E3M2", (rows, 4)),
            "exponents": ("F8_E8M0", (rows, 2)),
            "unsigned": ("U64", (3,)),
            "complex": ("C64", (2,)),
            "short": ("U16", (5,)),
            "fnuz": ("F8_E5M2FNUZ", (3,)),
            "float8": ("F8_E5M2", (7,)),
            "flags": ("BOOL", (3,)),
            "double": ("F64", (2,)),
        },
        method("of the future"),
    ),
}

# A format that is written, too.
WRITTEN: Mapping[str, Foreign] = {
    "int4 of symmetric settings": Foreign(
        lambda rows, columns: {
            "weight_packed": ("I32", (rows, columns // 8)),
            "weight_scale": ("BF16", (rows, columns // 32)),
            "weight_shape": ("I64", (2,)),
        },
        {"text_config": {"model_type": "llama", **packed(4, symmetric=True)}},
    ),
}


def write_foreign(folder: Path, name: str, *, shards: int = 2) -> Path:
    """A base of a format, over `shards` files."""
    foreign = {**FOREIGN, **WRITTEN}[name]
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter, shape in SIZES.shapes.items():
        module = parameter.removesuffix(".weight")
        own = foreign.tensors(*shape) if ".mlp." in module else {}
        kinds |= {f"{module}.{part}": kind for part, kind in own.items()} or {parameter: ("BF16", shape)}
    kinds |= foreign.others
    generator = torch.Generator().manual_seed(0)
    content = {tensor: _content(tensor, *kind, generator) for tensor, kind in kinds.items()}
    folder.mkdir(parents=True)
    each = -(-len(kinds) // shards)
    weight_map = {tensor: SHARD.format(place // each + 1, shards) for place, tensor in enumerate(kinds)}
    for shard in sorted(set(weight_map.values())):
        mine = [tensor for tensor in kinds if weight_map[tensor] == shard]
        entries = {tensor: (*kinds[tensor], content[tensor]) for tensor in mine}
        (folder / shard).write_bytes(safetensors(entries, foreign.metadata(mine)))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": SIZES.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **foreign.config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    for file, text in foreign.files.items():
        (folder / file).write_text(text)
    return folder


def _content(name: str, code: str, shape: tuple[int, ...], generator: torch.Generator) -> bytes:
    count = torch.Size(shape).numel()
    dtype = DTYPES.get(code) or PACKED[code]
    if name.endswith("weight_shape"):
        return (
            torch.tensor([SIZES.inner, SIZES.hidden] if "down" not in name else [SIZES.hidden, SIZES.inner])
            .numpy()
            .tobytes()
        )
    if code in ("F64", "F32", "F16", "BF16"):
        values = 0.05 * torch.randn(count, generator=generator)
        return (
            (values if name.endswith("proj.weight") else values.abs() + 0.01)
            .to(dtype.torch)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    if name.endswith("weight_g_idx"):
        groups = torch.arange(count, dtype=torch.int32) // 32
        return groups[torch.randperm(count, generator=generator)].numpy().tobytes()
    high = 2 if code == "BOOL" else 120  # no NaN among bytes of fp8
    return (
        torch.randint(high, (dtype.nbytes(shape),), generator=generator, dtype=torch.uint8).numpy().tobytes()
    )


def safetensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: Mapping[str, str]
) -> bytes:
    """A file, its header written by the plainest code there could be."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (code, shape, raw) in tensors.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values())


@dataclass(frozen=True, slots=True)
class Raw:
    """A file as it is: bytes by tensor, with type and shape, and its metadata."""

    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
    metadata: Mapping[str, str]


def read_raw(path: Path) -> Raw:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    return Raw(
        {
            name: (
                entry["dtype"],
                tuple(entry["shape"]),
                raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            )
            for name, entry in header.items()
        },
        metadata,
    )
