"""compressed-tensors' packed integers: the published layout, what is read of it and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streamconv
from streamconv.dtypes import BF16, DENSE
from streamconv.errors import CheckpointError, InputError, StreamconvError, UnsupportedError
from streamconv.formats import FORMATS, find_weights, format_of, with_groups
from streamconv.formats.base import Encoder
from tests.checkpoint.files import index_of
from tests.formats.stored import W, decode_every_weight, decoded, normal, only_weight, stored, write
from tests.models import write_adapter
from tests.tiny import read_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "compressed-tensors-0.20.0"
PACKED, SCALE, SHAPE = (
    W.removesuffix("weight") + role for role in ("weight_packed", "weight_scale", "weight_shape")
)
BITS = {"w4a16": 4, "w8a16": 8}
every_name = pytest.mark.parametrize("name", BITS)


def encoder_of(name: str, shape: tuple[int, int], group: int = 32, dtype: str = "bfloat16") -> Encoder:
    return with_groups(FORMATS[name], group).encoder(W, shape, DENSE[dtype])


def formula(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The weight as compressed-tensors describes it, by integers of Python's own size: float32 [out, in]."""
    rows, columns = tensors[SHAPE].tolist()
    words = tensors[PACKED].numpy().view(np.uint32).astype(object)
    codes = np.zeros((rows, columns), np.int64)
    for row in range(rows):
        row_bits = sum(int(word) << (32 * place) for place, word in enumerate(words[row]))
        for k in range(columns):
            codes[row, k] = ((row_bits >> (bits * k)) % 2**bits) - 2 ** (bits - 1)
    scales = tensors[SCALE].repeat_interleave(columns // tensors[SCALE].shape[1], dim=1)
    return (torch.from_numpy(codes).to(scales.dtype) * scales).float()


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(BITS)),
    rows=st.integers(1, 6).map(lambda count: 2 * count),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(sorted(DENSE)),
    size=st.sampled_from([1e-6, 0.02, 300.0]),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_what_the_format_says(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    rows: int,
    groups: int,
    group: int,
    dtype: str,
    size: float,
    seed: int,
) -> None:
    weight = normal((rows, groups * group), seed, size)
    tensors = stored(encoder_of(name, (rows, groups * group), group, dtype), weight)
    assert tensors[SCALE].shape == (rows, groups)
    assert tensors[SCALE].dtype == DENSE[dtype].torch
    expected = formula(tensors, BITS[name])
    read = only_weight(write(tmp_path_factory.getbasetemp() / "packed", tensors))
    assert format_of(read.format) == with_groups(FORMATS[name], group)
    assert torch.equal(decoded(read), expected)


@every_name
@pytest.mark.parametrize("dtype", DENSE)
def test_codes_are_the_nearest_with_the_scale_as_it_is_stored(name: str, dtype: str) -> None:
    weight, half = normal((64, 128)), 2 ** (BITS[name] - 1)
    encoder = encoder_of(name, (64, 128), dtype=dtype)
    tensors = stored(encoder, weight)
    scales = tensors[SCALE].double().repeat_interleave(32, dim=1)
    codes = (formula({**tensors, SCALE: torch.ones(64, 4)}, BITS[name])).double()
    error = (codes * scales - weight.double()).abs()
    for step in (-1, 1):
        other = (codes + step).clamp(-half, half - 1)
        # They are chosen by a float32 that was rounded twice: to that, two may be equally near.
        slack = half * 2**-22 * scales
        assert bool((error <= (other * scales - weight.double()).abs() + slack).all())
    greatest = weight.view(64, 4, 32).abs().amax(-1)
    expected = (greatest / ((2 ** BITS[name] - 1) / 2)).to(DENSE[dtype].torch)
    assert torch.equal(tensors[SCALE], expected)


@every_name
def test_scales_that_are_stored_are_effective_as_they_are(name: str) -> None:
    encoder = encoder_of(name, (64, 128), dtype="float16")
    once = encoder.effective_scales(torch.rand(256) * torch.logspace(-9, 4, 256))
    assert torch.equal(encoder.effective_scales(once), once)


@every_name
def test_blocks_of_zeros_and_of_what_is_too_small_for_a_scale_are_zeros(name: str, tmp_path: Path) -> None:
    weight = normal((64, 64))
    weight[:, :32] = 0
    weight[1] = 1e-12
    read = only_weight(write(tmp_path, stored(encoder_of(name, (64, 64), dtype="float16"), weight)))
    assert not decoded(read)[:, :32].any()
    assert not decoded(read)[1].any()


def test_a_scale_that_does_not_fit_float16_is_refused() -> None:
    with pytest.raises(InputError, match="too large for a scale of float16"):
        stored(encoder_of("w4a16", (64, 64), dtype="float16"), normal((64, 64), size=1e6))


@pytest.mark.parametrize("shape", [(64, 100), (1, 128), (3, 384), (2, 128, 3), (128,)], ids=str)
def test_what_is_not_whole_groups_does_not_fit(shape: tuple[int, ...]) -> None:
    assert not FORMATS["w4a16"].fits(W, shape)
    with pytest.raises(UnsupportedError, match=r"rows in groups of 128: exclude it"):
        FORMATS["w4a16"].encoder(W, shape, BF16)


# -- what compressed-tensors wrote -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "stored_as", "count"),
    [
        ("w4a16", "w4a16, group size 32", 6),
        ("w8a16", "w8a16, group size 32", 7),
        ("w4a16_rows", "w4a16, a scale a row", 7),
    ],
)
def test_golden_files_are_decoded_exactly(folder: str, stored_as: str, count: int, tmp_path: Path) -> None:
    expected = read_tensors(GOLDEN / folder / "expected.safetensors")
    found = {weight.name: weight for weight in find_weights(index_of(GOLDEN / folder))}
    assert {name for name, weight in found.items() if weight.decoder.grid is not None} == set(expected)
    assert len(expected) == count
    for name, values in expected.items():
        assert found[name].format == stored_as
        assert found[name].dtype.torch == values.dtype
        assert torch.equal(decoded(found[name]), values.float())
    streamconv.convert(GOLDEN / folder, tmp_path / "dense", quant="none", device="cpu")
    dense = read_tensors(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(dense[name], values) for name, values in expected.items())
    assert not [name for name in dense if "weight_" in name]
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_golden_checkpoint_that_keeps_its_format_keeps_its_bytes(tmp_path: Path) -> None:
    streamconv.convert(GOLDEN / "w4a16", tmp_path / "kept", device="cpu")
    before, after = (
        read_tensors(each / "model.safetensors") for each in (GOLDEN / "w4a16", tmp_path / "kept")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_a_scale_a_row_is_read_and_not_written(tmp_path: Path) -> None:
    streamconv.convert(GOLDEN / "w4a16_rows", tmp_path / "kept", device="cpu")
    before, after = (each / "model.safetensors" for each in (GOLDEN / "w4a16_rows", tmp_path / "kept"))
    assert before.read_bytes() == after.read_bytes()
    adapter = write_adapter(tmp_path / "adapter", {W: (96, 64)}, targets=("up_proj",))
    with pytest.raises(UnsupportedError, match=r"are w4a16, a scale a row, which is read but not written"):
        streamconv.merge(GOLDEN / "w4a16_rows", adapter, tmp_path / "out", device="cpu")


@pytest.mark.parametrize(("bits", "columns"), [(4, 5), (4, 13), (8, 5), (8, 50)])
def test_the_last_word_of_a_row_may_be_filled_up(tmp_path: Path, bits: int, columns: int) -> None:
    words = -(-columns * bits // 32)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        PACKED: torch.randint(-(2**31), 2**31, (70, words), generator=generator).to(torch.int32),
        SCALE: torch.rand(70, 1, generator=generator).bfloat16(),
        SHAPE: torch.tensor([70, columns]),
    }
    weights: dict[str, Any] = {"num_bits": bits, "strategy": "channel", "type": "int", "symmetric": True}
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    described = {"quant_method": "compressed-tensors", "format": "pack-quantized", **config}
    read = only_weight(write(tmp_path, tensors, {"quantization_config": described}))
    assert torch.equal(decoded(read), formula(tensors, bits))


# -- what is refused ---------------------------------------------------------------------------------------------


def golden(folder: Path, name: str = "w4a16") -> tuple[Path, dict[str, Any]]:
    """A copy, and its config."""
    shutil.copytree(GOLDEN / name, folder)
    (folder / "expected.safetensors").unlink()
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return folder, found


def changed(config: dict[str, Any], path: str, value: object) -> str:
    level = config["quantization_config"]
    *keys, last = path.split("/")
    for key in keys:
        level = level[key]
    level[last] = value
    return json.dumps(config)


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("format", "float-quantized", UnsupportedError, "its format is 'float-quantized'"),
        ("kv_cache_scheme", {"num_bits": 8}, UnsupportedError, "its KV cache is quantized"),
        ("transform_config", {"config_groups": {"u": {}}}, UnsupportedError, "its weights are rotated"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, UnsupportedError, "its weights are sparse"),
        ("config_groups", {}, CheckpointError, "config_groups is missing"),
        ("config_groups", {"W4A16_ASYM": ["Linear"]}, UnsupportedError, "W4A16_ASYM is"),
        (f"{GROUP}/format", "int-quantized", UnsupportedError, "group_0 has the format 'int-quantized'"),
        (f"{GROUP}/input_activations", {"num_bits": 8}, UnsupportedError, "group_0 quantizes activations"),
        (f"{GROUP}/weights/num_bits", 3, UnsupportedError, "group_0 has weights of 3 bits"),
        (f"{GROUP}/weights/type", "float", UnsupportedError, "4 bits, type 'float'"),
        (f"{GROUP}/weights/symmetric", False, UnsupportedError, "group_0 has asymmetric weights"),
        (f"{GROUP}/weights/strategy", "tensor", UnsupportedError, "group_0 has the strategy 'tensor'"),
        (f"{GROUP}/weights/actorder", "group", UnsupportedError, "in the order of activations"),
        (f"{GROUP}/weights/group_size", 64, CheckpointError, "is stored in 4 bits, groups of 32, and config"),
        (f"{GROUP}/weights/num_bits", 8, CheckpointError, "config.json says 8 bits, groups of 32"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(
    tmp_path: Path, path: str, value: object, error: type[StreamconvError], message: str
) -> None:
    folder, config = golden(tmp_path / "model")
    (folder / "config.json").write_text(changed(config, path, value))
    with pytest.raises(error, match=message):
        decode_every_weight(index_of(folder))


def test_a_group_by_the_name_of_its_scheme_is_read(tmp_path: Path) -> None:
    tensors = stored(encoder_of("w4a16", (64, 128), 128), normal((64, 128)))
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"W4A16": ["Linear"]},
    }
    assert only_weight(write(tmp_path, tensors, {"quantization_config": config})).format == "w4a16"


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        (W.replace("weight", "weight_zero_point"), torch.ones(8, 4), UnsupportedError, "asymmetric"),
        (W.replace("weight", "weight_g_idx"), torch.ones(128), UnsupportedError, "order of activations"),
        (SCALE, None, CheckpointError, "weight_scale is missing, without which"),
        (SHAPE, None, CheckpointError, "weight_shape is missing, without which"),
        (PACKED, None, CheckpointError, "weight_scale belongs to a quantized weight that is missing"),
        (
            SCALE,
            torch.ones(64, 3),
            CheckpointError,
            r"found F32 \[64, 3\], expected a float type and \[64, groups\]",
        ),
        (SCALE, torch.ones(64, 4).int(), CheckpointError, r"found I32 \[64, 4\], expected a float type"),
        (SHAPE, torch.tensor([64, 0]), CheckpointError, r"found \[64, 0\], expected positive"),
        (SHAPE, torch.tensor([64.0, 128.0]), CheckpointError, r"found F32 \[2\], expected I64 \[2\]"),
        (
            SHAPE,
            torch.tensor([64, 256]),
            CheckpointError,
            r"found I32 \[64, 16\], expected I32 \[64, 32\] or",
        ),
        (
            PACKED,
            torch.ones(64, 16),
            CheckpointError,
            r"found F32 \[64, 16\], expected I32 \[64, 16\] or \[64, 32\]",
        ),
    ],
)
def test_parts_that_do_not_agree_are_refused(
    tmp_path: Path, name: str, tensor: Tensor | None, error: type[StreamconvError], message: str
) -> None:
    tensors = stored(encoder_of("w4a16", (64, 128)), normal((64, 128)))
    config = with_groups(FORMATS["w4a16"], 32).quantization_config(BF16, (), ())
    tensors = (
        {**tensors, name: tensor} if tensor is not None else {k: v for k, v in tensors.items() if k != name}
    )
    with pytest.raises(error, match=message):
        decode_every_weight(write(tmp_path, tensors, {"quantization_config": config}))


def test_rows_too_short_to_tell_the_bits_are_refused(tmp_path: Path) -> None:
    tensors = {
        PACKED: torch.ones(64, 1, dtype=torch.int32),
        SCALE: torch.ones(64, 1),
        SHAPE: torch.tensor([64, 4]),
    }
    with pytest.raises(UnsupportedError, match="too short to tell 4 bits from 8"):
        decode_every_weight(
            write(
                tmp_path, tensors, {"quantization_config": FORMATS["w4a16"].quantization_config(BF16, (), ())}
            )
        )


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = stored(encoder_of("w4a16", (64, 128)), normal((64, 128)))
    tensors[SCALE][3, 1] = float("nan")
    with pytest.raises(CheckpointError, match="weight_scale: a stored scale is NaN or infinite"):
        decoded(only_weight(write(tmp_path, tensors)))
