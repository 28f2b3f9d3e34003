"""Storages that are read and not written: values equal to those of the libraries that own them, or to the formula."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamconv
from streamconv.errors import CheckpointError
from streamconv.formats import find_weights
from streamconv.formats.gpt_oss import ExpertsTurned
from tests.formats.stored import W, decoded, normal, only_weight, write
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json, read_tensors

MODULE = W.removesuffix("weight")
OTHER = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
COMPRESSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "float-quantized, a row": (FloatQuantizationCompressor, {"num_bits": 8, "strategy": "channel"}),
    "float-quantized, tensor": (FloatQuantizationCompressor, {"num_bits": 8, "strategy": "tensor"}),
    "float-quantized, block": (
        FloatQuantizationCompressor,
        {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4-pack-quantized": (
        NVFP4PackedCompressor,
        {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4-pack-quantized": (
        MXFP4PackedCompressor,
        {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}


def compressed(kind: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parts with scales as random as a file could have them, and the config that goes with them."""
    _, weights = COMPRESSED[kind]
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    parts: dict[str, Tensor]
    if "float" in kind:
        of = {"a row": (rows, 1), "tensor": (1,), "block": (-(-rows // 128), -(-columns // 128))}
        scales = torch.rand(of[kind.partition(", ")[2]], generator=generator) * 0.01 + 1e-3
        parts = {"weight": normal(shape, size=60).to(torch.float8_e4m3fn), "weight_scale": scales.bfloat16()}
    else:
        group = weights["group_size"]
        parts = {
            "weight_packed": torch.randint(
                0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8
            )
        }
        size = (rows, columns // group)
        if group == 16:
            parts["weight_scale"] = (torch.rand(size, generator=generator) * 100).to(torch.float8_e4m3fn)
            parts["weight_global_scale"] = torch.tensor([1234.5])
        else:
            parts["weight_scale"] = torch.randint(110, 125, size, generator=generator, dtype=torch.uint8)
    group_config = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}
    config = {
        "quant_method": "compressed-tensors",
        "format": kind.partition(",")[0],
        "config_groups": {"group_0": group_config},
    }
    return parts, config


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("shape", [(256, 256), (70, 96), (129, 160)], ids=str)
def test_values_are_those_of_compressed_tensors(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    compressor, _ = COMPRESSED[kind]
    parts, config = compressed(kind, shape)
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    want = compressor.decompress(dict(parts), scheme)["weight"].float()
    tensors = {MODULE + role: part for role, part in parts.items()} | OTHER
    found = find_weights(write(tmp_path, tensors, {"quantization_config": config}))
    weight = next(each for each in found if each.name == W)
    assert weight.shape == shape
    got = decoded(weight)
    if kind == "nvfp4-pack-quantized":  # it divides scales, and we multiply by the reciprocal, rounding once
        assert (got - want).abs().max() <= 2**-7 * want.abs().max()
        exact = values_of_nvfp4(parts).bfloat16().float()
        assert torch.equal(got, exact)
    else:
        assert torch.equal(got, want.bfloat16().float())


def values_of_nvfp4(parts: Mapping[str, Tensor]) -> Tensor:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat((table, -table))
    packed = parts["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    scales = parts["weight_scale"].double().repeat_interleave(16, 1)
    return (table[codes] * scales / parts["weight_global_scale"].double()).float()


@pytest.mark.parametrize("shape", [(256, 256), (200, 130), (64, 128), (3, 5)], ids=str)
def test_deepseek_blocks_are_ragged_at_the_ends(shape: tuple[int, int], tmp_path: Path) -> None:
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    main, scales = normal(shape, size=50).to(torch.float8_e4m3fn), torch.rand(blocks) + 0.1
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}}
    index = write(
        tmp_path, {W: main, f"{W}_scale_inv": scales, f"{MODULE}input_scale": torch.ones(1)}, config
    )
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(decoded(only_weight(index)), (main.float() * spread).half().float())


def test_experts_of_gpt_oss_are_those_of_transformers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(115, 130, (3, 10, 4), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales} | OTHER
    index = write(tmp_path, tensors, {"quantization_config": {"quant_method": "mxfp4"}})
    weight = next(each for each in find_weights(index) if each.name == name)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert weight.shape == tuple(want.shape) == (3, 128, 10)
    assert torch.equal(decoded(weight), want.float())


@pytest.mark.parametrize("step", [1, 3, 7, 24])
def test_lines_turn_in_any_runs_and_back(step: int) -> None:
    order = ExpertsTurned(experts=3, outputs=8, inputs=64)
    stored = torch.randint(0, 256, (order.lines, order.line_bytes), dtype=torch.uint8)
    form, back = torch.empty(stored.numel(), dtype=torch.uint8), torch.empty_like(stored)
    runs = [range(first, min(first + step, order.lines)) for first in range(0, order.lines, step)]
    for lines in runs:
        order.from_file(stored[lines.start : lines.stop].flatten(), lines, form)
    for lines in runs:
        order.to_file(form, lines, back[lines.start : lines.stop].view(-1))
    assert torch.equal(back, stored)


# -- what is wrong with a file -----------------------------------------------------------------------------------------

FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "has no weight_scale_inv"),
        (torch.ones(3, 3), r"found F32 \[3, 3\], expected"),
        (torch.ones(1, 1, dtype=torch.int32), "found I32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scales: Tensor | None, message: str, tmp_path: Path) -> None:
    tensors = {W: torch.zeros(100, 100).to(torch.float8_e4m3fn)}
    if scales is not None:
        tensors[f"{W}_scale_inv"] = scales
    with pytest.raises(CheckpointError, match=message):
        find_weights(write(tmp_path, tensors, FP8_CONFIG))


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    scales = torch.full((1, 1), torch.nan)
    tensors = {W: torch.zeros(100, 100).to(torch.float8_e4m3fn), f"{W}_scale_inv": scales}
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        decoded(only_weight(write(tmp_path, tensors, FP8_CONFIG)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_global_scale_that_cannot_be_is_refused(value: float, tmp_path: Path) -> None:
    parts, config = compressed("nvfp4-pack-quantized", (16, 32))
    parts["weight_global_scale"] = torch.tensor([value])
    tensors = {MODULE + role: part for role, part in parts.items()}
    with pytest.raises(CheckpointError, match="expected a positive number"):
        find_weights(write(tmp_path, tensors, {"quantization_config": config}))


def test_a_global_scale_that_is_missing_is_refused(tmp_path: Path) -> None:
    parts, config = compressed("nvfp4-pack-quantized", (16, 32))
    del parts["weight_global_scale"]
    tensors = {MODULE + role: part for role, part in parts.items()}
    with pytest.raises(CheckpointError, match="weight_global_scale"):
        find_weights(write(tmp_path, tensors, {"quantization_config": config}))


# -- a merge -----------------------------------------------------------------------------------------------------------


def test_a_merge_into_an_fp8_base_is_in_16_bit_and_forgets_its_scales(tmp_path: Path) -> None:
    sizes = Sizes(hidden=64, inner=72, layers=1, vocabulary=50)
    base = write_base(tmp_path / "base", sizes.shapes, shards=1)
    adapter = write_adapter(tmp_path / "adapter", sizes.shapes, targets=("q_proj",))
    merged = streamconv.merge(base, adapter, tmp_path / "dense").out
    path = base / "model.safetensors"
    tensors = read_tensors(path)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        codes = tensors[name].float().to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": torch.ones(1, 1)}
    from safetensors.torch import save_file

    save_file(tensors, path)
    edit_json(base / "config.json", **FP8_CONFIG)
    streamconv.merge(base, adapter, tmp_path / "out", quant="none")
    got, want = (read_tensors(folder / "model.safetensors") for folder in (tmp_path / "out", Path(merged)))
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        # What FP8 takes is at most 1/16 of a value, and here values below 2^-9 besides.
        assert (tensor - want[name]).abs().max() <= want[name].abs().max() / 16 + 2**-9
