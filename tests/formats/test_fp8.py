"""FP8 bases of every kind: read, kept in their own storage, and refused where they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.formats import find_weights
from tests.formats.stored import W, decoded, normal, write
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json, read_tensors

SIZES = Sizes(hidden=96, inner=200, layers=2, vocabulary=50)  # blocks of 128 end within rows and columns
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to store FP8: the config, the form of its name, and the parts of a weight beside the main one."""

    config: Mapping[str, Any]
    form: str
    height: Callable[[int], int]
    width: Callable[[int], int]
    role: str = "weight_scale"
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    beside: tuple[str, ...] = ()

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of `weight`, by role, as the owner's library quantizes it; some codes are -0."""
        rows, columns = weight.shape
        size = (self.height(rows), self.width(columns))
        blocks = tuple(-(-length // side) for length, side in zip(weight.shape, size, strict=True))
        padded = torch.zeros(blocks[0] * size[0], blocks[1] * size[1])
        padded[:rows, :columns] = weight.float()
        scales = padded.view(blocks[0], size[0], blocks[1], size[1]).abs().amax((1, 3)) / 448
        scales = scales.to(self.dtype)
        wide = scales.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[:rows, :columns]
        codes = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        codes.view(torch.uint8)[::7, ::5] = 0x80
        shape = (rows,) if self.shape == (-1,) else scales.shape if self.shape is None else self.shape
        found = {"weight": codes, self.role: scales.reshape(shape)}
        return found | {role: torch.full((1,), 0.5) for role in self.beside}


def compressed(
    weights: Mapping[str, Any], activations: Mapping[str, Any] | None, **more: Any
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*norm"],
        **more,
    }


def by_blocks(size: list[int], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": size,
        **more,
    }


def same(length: int) -> Callable[[int], int]:
    return lambda _: length


def whole(length: int) -> int:
    return length


CHANNEL, TENSOR = {"strategy": "channel"}, {"strategy": "tensor"}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
KINDS: Mapping[str, Kind] = {
    "channel, dynamic": Kind(compressed(CHANNEL, DYNAMIC), "fp8", same(1), whole, dtype=torch.bfloat16),
    "channel, float32": Kind(compressed(CHANNEL, DYNAMIC), "fp8, scales in F32", same(1), whole),
    "channel, weights only": Kind(compressed(CHANNEL, None), "fp8", same(1), whole, dtype=torch.bfloat16),
    "tensor, static": Kind(
        compressed(TENSOR, STATIC),
        "fp8, a scale a tensor, static activations",
        whole,
        whole,
        shape=(1,),
        dtype=torch.bfloat16,
        beside=("input_scale",),
    ),
    "tensor, with a KV cache": Kind(
        compressed(TENSOR, DYNAMIC, kv_cache_scheme=STATIC),
        "fp8, a scale a tensor, scales in F32, static activations",
        whole,
        whole,
        shape=(),
        beside=("k_scale", "v_scale"),
    ),
    "compressed-tensors, blocks": Kind(
        compressed(BLOCK, DYNAMIC),
        "fp8-block, weight_scale, scales in BF16",
        same(128),
        same(128),
        dtype=torch.bfloat16,
    ),
    "DeepSeek": Kind(by_blocks([128, 128]), "fp8-block", same(128), same(128), "weight_scale_inv"),
    "DeepSeek, other blocks": Kind(
        by_blocks([48, 20], modules_to_not_convert=["lm_head"]),
        "fp8-block, blocks of 48 x 20",
        same(48),
        same(20),
        "weight_scale_inv",
    ),
    "DeepSeek, static": Kind(
        by_blocks([64, 64]) | {"activation_scheme": "static"},
        "fp8-block, blocks of 64 x 64, static activations",
        same(64),
        same(64),
        "weight_scale_inv",
        beside=("input_scale",),
    ),
    "FBGEMM": Kind(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "fp8, scales in F32",
        same(1),
        whole,
        beside=("input_scale_ub",),
    ),
    "a row, in one axis": Kind(
        {"quant_method": "fbgemm_fp8"},
        "fp8, scales in one axis, scales in F32",
        same(1),
        whole,
        shape=(-1,),
    ),
    "ModelOpt": Kind(
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "fp8, a scale a tensor, scales in F32",
        whole,
        whole,
        shape=(),
        beside=("input_scale",),
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def write_quantized(folder: Path, kind: Kind) -> Path:
    """A model whose projections are stored in FP8 of that kind."""
    base = write_base(folder, SIZES.shapes, shards=1)
    tensors = read_tensors(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        module = name.removesuffix("weight")
        tensors |= {module + role: part for role, part in kind.parts(tensors[name]).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    edit_json(base / "config.json", quantization_config=dict(kind.config))
    return base


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def merged(base: Path, out: Path, size: float = 1e-30, **options: Any) -> dict[str, Tensor]:
    adapter = write_adapter(out.parent / f"adapter-{size}", SIZES.shapes, size=size)
    streamconv.merge(base, adapter, out, **{"min_kept": 0.0, **options})
    return read_tensors(out / "model.safetensors")


@every_kind
def test_values_are_the_float_times_its_scale(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    weight = normal((200, 96))
    parts = kind.parts(weight)
    tensors = {W.removesuffix("weight") + role: part for role, part in parts.items()}
    tensors["model.norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    index = write(tmp_path, tensors, {"quantization_config": dict(kind.config)})
    found = next(each for each in find_weights(index) if each.name == W)
    assert (found.format, found.shape, found.dtype.torch) == (kind.form, (200, 96), torch.bfloat16)
    scales = parts[kind.role].float().reshape(-1)
    rows, columns = (
        torch.arange(length) // side for length, side in ((200, kind.height(200)), (96, kind.width(96)))
    )
    wide = scales[rows[:, None] * (int(columns[-1]) + 1) + columns]
    assert torch.equal(decoded(found), (parts["weight"].float() * wide).bfloat16().float())


@every_kind
def test_an_update_of_nothing_leaves_every_byte(name: str, tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base", KINDS[name])
    before = read_tensors(base / "model.safetensors")
    after = merged(base, tmp_path / "out", quant="keep")
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[key].dtype, before[key].shape)
        assert bytes_of(tensor) == bytes_of(before[key])
    said = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out")]
    assert said[0] == said[1]
    assert list(said[0]) == list(said[1])
