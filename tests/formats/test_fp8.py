"""FP8 bases of every kind: read, kept in their own storage, and refused where they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.errors import CheckpointError, InputError
from streamconv.formats import find_weights
from tests.checkpoint.files import index_of
from tests.formats.stored import W, decoded, normal, only_weight, write
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
    "DeepSeek, tall": Kind(
        by_blocks([64, 128]), "fp8-block, blocks of 64 x 128", same(64), same(128), "weight_scale_inv"
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


def write_quantized(folder: Path, kind: Kind, sizes: Sizes = SIZES) -> Path:
    """A model whose projections are stored in FP8 of that kind."""
    base = write_base(folder, sizes.shapes, shards=1)
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


def wide_of(scales: Tensor, shape: Sequence[int], kind: Kind) -> Tensor:
    """The scale of every element."""
    rows, columns = (
        torch.arange(length) // side(length)
        for length, side in zip(shape, (kind.height, kind.width), strict=True)
    )
    return scales.float().reshape(-1)[rows[:, None] * (int(columns[-1]) + 1) + columns]


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
    wide = wide_of(parts[kind.role], (200, 96), kind)
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


@every_kind
@pytest.mark.parametrize("rounding", ["auto", "nearest", "search"])
def test_an_update_is_kept_in_the_storage_of_the_base(name: str, rounding: str, tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base", KINDS[name])
    after = merged(base, tmp_path / "out", 0.02, quant="keep", rounding=rounding)
    want = merged(base, tmp_path / "dense", 0.02, quant="none")
    report = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    assert report["kept_by_weight"].keys() == {
        key
        for key in want
        if key.endswith(("q_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight"))
    }
    assert all(0.9 < share < 1.1 for share in report["kept_by_weight"].values())
    before = read_tensors(base / "model.safetensors")
    assert {key: (each.dtype, each.shape) for key, each in after.items()} == {
        key: (each.dtype, each.shape) for key, each in before.items()
    }
    found = {each.name: each for each in find_weights(index_of(tmp_path / "out"))}
    for key, tensor in want.items():
        error = decoded(found[key]) - tensor.float()
        # Half a step of the value's own magnitude, or a whole one at random; and an end that is not moved.
        assert error.norm() <= 0.06 * tensor.float().norm()
        for role in KINDS[name].beside:
            side = key.removesuffix("weight") + role
            assert side not in before or torch.equal(after[side], before[side])


@pytest.mark.parametrize("rounding", ["auto", "stochastic", "nearest"])
@pytest.mark.parametrize("name", ["tensor, static", "tensor, with a KV cache"])
def test_one_scale_grows_where_the_update_needs_it(name: str, rounding: str, tmp_path: Path) -> None:
    """Values beyond 464 times the scale are farther from the greatest, 448, than rounding takes any: a scale anew."""
    base = write_quantized(tmp_path / "base", KINDS[name])
    tensors = read_tensors(base / "model.safetensors")
    small = "model.layers.0.mlp.up_proj"
    tensors[f"{small}.weight_scale"] /= 64  # what is added is large beside it
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    after = merged(base, tmp_path / "out", 0.02, quant="keep", rounding=rounding)
    want = merged(base, tmp_path / "dense", 0.02, quant="none")[f"{small}.weight"].float()
    scale = after[f"{small}.weight_scale"].float()
    assert scale.item() == pytest.approx(want.abs().max().item() / 448, rel=2**-7)
    assert scale > 2 * tensors[f"{small}.weight_scale"].float()
    found = {each.name: each for each in find_weights(index_of(tmp_path / "out"))}
    assert (decoded(found[f"{small}.weight"]) - want).norm() <= 0.05 * want.norm()
    other = "model.layers.1.mlp.gate_proj"
    for role in ("weight", "weight_scale"):  # not updated
        assert bytes_of(after[f"{other}.{role}"]) == bytes_of(tensors[f"{other}.{role}"])


def test_one_scale_stays_where_hardly_anything_is_beyond_it(tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base", KINDS["tensor, static"])
    before = read_tensors(base / "model.safetensors")
    after = merged(base, tmp_path / "out", 1e-4, quant="keep")
    for key, tensor in before.items():
        if key.endswith("weight_scale"):
            assert bytes_of(after[key]) == bytes_of(tensor)


def test_blocks_of_another_size_are_chosen_anew(tmp_path: Path) -> None:
    """Their runs are as long, and what a scale is for is not."""
    sizes = Sizes(hidden=96, inner=256, layers=2, vocabulary=50)
    base = write_quantized(tmp_path / "base", KINDS["DeepSeek, tall"], sizes)
    streamconv.convert(base, tmp_path / "out", quant="fp8-block")
    before, after = (
        {each.name: decoded(each) for each in find_weights(index_of(folder))}
        for folder in (base, tmp_path / "out")
    )
    for key, values in after.items():
        assert (values - before[key]).norm() <= 0.04 * before[key].norm()


@pytest.mark.parametrize("quant", ["fp8", "fp8-block"])
def test_values_are_no_farther_than_those_of_the_format_s_own_recipe(quant: str, tmp_path: Path) -> None:
    sizes = Sizes(hidden=96, inner=256, layers=2, vocabulary=50)
    base = write_base(tmp_path / "base", sizes.shapes, shards=1)
    streamconv.convert(base, tmp_path / "out", quant=quant)
    kind = KINDS["channel, dynamic" if quant == "fp8" else "DeepSeek"]
    found = {each.name: each for each in find_weights(index_of(tmp_path / "out"))}
    for key, tensor in read_tensors(base / "model.safetensors").items():
        if not key.endswith("proj.weight"):
            assert found[key].format == "bfloat16"
            continue
        assert found[key].format == quant
        parts, ours = kind.parts(tensor), read_tensors(tmp_path / "out" / "model.safetensors")
        assert torch.equal(ours[key.removesuffix("weight") + kind.role], parts[kind.role])
        theirs = parts["weight"].float() * wide_of(parts[kind.role], tensor.shape, kind)
        errors = [(values - tensor.float()).abs() for values in (decoded(found[key]), theirs)]
        assert bool((errors[0] <= errors[1] * (1 + 2**-7) + 2**-8 * tensor.float().abs()).all())


def test_rows_that_end_within_a_block_stay_in_16_bit(tmp_path: Path) -> None:
    """transformers takes them for blocks of another size, and says nothing; a base that has them keeps them."""
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)  # 200 are two blocks of 100, for it
    streamconv.convert(base, tmp_path / "out", quant="fp8-block")
    for each in find_weights(index_of(tmp_path / "out")):
        is_fp8 = each.name.endswith("proj.weight") and 200 not in each.shape
        assert each.format == ("fp8-block" if is_fp8 else "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.mlp.down_proj"} <= set(config["modules_to_not_convert"])


# -- what is wrong with a file -----------------------------------------------------------------------------------------


def broken(kind: str, tmp_path: Path, **changed: Tensor | None) -> Path:
    parts = {**KINDS[kind].parts(normal((200, 96))), **changed}
    tensors = {W.removesuffix("weight") + role: part for role, part in parts.items() if part is not None}
    write(tmp_path, tensors, {"quantization_config": dict(KINDS[kind].config)})
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("DeepSeek", {"weight_scale_inv": None}, "has no weight_scale_inv or weight_scale beside it"),
        ("DeepSeek", {"weight_scale_inv": torch.ones(2, 2)}, r"found F32 \[2, 2\], expected .* \[2, 1\]"),
        ("channel, dynamic", {"weight_scale": torch.ones(200, 3)}, r"found F32 \[200, 3\]"),
        ("tensor, static", {"weight_scale": torch.ones(2)}, r"found F32 \[2\]"),
        ("DeepSeek", {"weight_scale_inv": torch.ones(2, 1, dtype=torch.int32)}, "found I32"),
        ("DeepSeek", {"weight": torch.zeros(96).to(torch.float8_e4m3fn)}, r"found \[96\], expected a matrix"),
        (
            "DeepSeek",
            {"weight_scale_inv": torch.tensor([[1.0], [torch.nan]])},
            "stored scale is NaN or infinite",
        ),
        ("DeepSeek", {"weight_scale_inv": torch.tensor([[1.0], [3e38]])}, "stored scale is NaN or infinite"),
        ("DeepSeek", {"weight_scale_inv": torch.tensor([[1.0], [-1.0]])}, "stored scale is negative"),
    ],
    ids=lambda each: "" if isinstance(each, dict) else str(each),
)
def test_a_broken_file_is_refused_by_name(
    kind: str, changed: Mapping[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)mlp.up_proj.*{message}"):
        decoded(only_weight(index_of(broken(kind, tmp_path, **changed))))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_found(code: int, tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base", KINDS["DeepSeek"])
    tensors = read_tensors(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = code
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for quant in ("keep", "none", "fp8"):
        with pytest.raises(InputError, match=r"up_proj.weight: the value at row 3, column 5 is nan"):
            merged(base, tmp_path / quant, 0.02, quant=quant)
