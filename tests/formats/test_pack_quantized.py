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
from streamconv.formats.base import Encoder, group_of
from tests.checkpoint.files import index_of
from tests.formats.stored import (
    W,
    decode_every_weight,
    decoded,
    normal,
    only_weight,
    raw_bytes,
    side_parts,
    stored,
    write,
)
from tests.models import write_adapter
from tests.tiny import edit_json, edit_tensors, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "compressed-tensors-0.20.0"
ORDERED = GOLDEN.parent / "compressed-tensors-0.17.0"
PACKED, SCALE, SHAPE, ZEROS, ORDER = (
    W.removesuffix("weight") + role
    for role in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
)
BITS = {"w4a16": 4, "w4a16-asym": 4, "w8a16": 8}
SYMMETRIC = [name for name in BITS if not name.endswith("asym")]
every_name = pytest.mark.parametrize("name", BITS)


def encoder_of(name: str, shape: tuple[int, int], group: int = 32, dtype: str = "bfloat16") -> Encoder:
    return with_groups(FORMATS[name], group).encoder(W, shape, DENSE[dtype])


def formula(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The weight as compressed-tensors describes it, by integers of Python's own size: float32 [out, in]."""
    rows, columns = tensors[SHAPE].tolist()
    codes, groups = unpacked(tensors[PACKED], columns, bits), tensors[SCALE].shape[1]
    zeros = np.full((rows, groups), 2 ** (bits - 1))
    if ZEROS in tensors:
        zeros = unpacked(tensors[ZEROS].T.contiguous(), rows, bits).T
    order = tensors.get(ORDER, torch.arange(columns) // (columns // groups)).long()
    scales = tensors[SCALE][:, order]
    return (torch.from_numpy(codes - zeros[:, order.numpy()]).to(scales.dtype) * scales).float()


def unpacked(words: Tensor, count: int, bits: int) -> Any:
    """The first codes of every line of `words`, in an array."""
    lines = words.numpy().view(np.uint32).astype(object)
    codes = np.zeros((len(lines), count), np.int64)
    for number, line in enumerate(lines):
        all_bits = sum(int(word) << (32 * place) for place, word in enumerate(line))
        codes[number] = [(all_bits >> (bits * k)) % 2**bits for k in range(count)]
    return codes


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(BITS)),
    rows=st.integers(1, 3).map(lambda count: 8 * count),
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
    assert (ZEROS in tensors) == name.endswith("asym")
    expected = formula(tensors, BITS[name])
    read = only_weight(write(tmp_path_factory.getbasetemp() / "packed", tensors))
    assert format_of(read.format) == with_groups(FORMATS[name], group)
    assert torch.equal(decoded(read), expected)


@pytest.mark.parametrize("name", SYMMETRIC)
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


@pytest.mark.parametrize("name", SYMMETRIC)
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


def test_zero_points_that_are_stored_are_effective_as_they_are() -> None:
    encoder = encoder_of("w4a16-asym", (64, 128), dtype="float16")
    size = torch.rand(256) * torch.logspace(-9, 3, 256)
    once = encoder.effective_scales(torch.stack((size, -2 * size * torch.linspace(0, 1, 256)), dim=1))
    assert torch.equal(encoder.effective_scales(once), once)


@pytest.mark.parametrize("dtype", DENSE)
def test_zero_points_are_where_a_group_has_its_0(dtype: str) -> None:
    weight = normal((64, 256)).add_(0.01 * torch.arange(-2, 2).repeat_interleave(64))
    weight[0, :64], weight[1, :64] = 0, weight[1, :64].abs()
    tensors = stored(encoder_of("w4a16-asym", (64, 256), 64, dtype), weight)
    found, step = formula(tensors, 4), tensors[SCALE].float().repeat_interleave(64, dim=1)
    assert not found[0, :64].any()
    assert bool(((found - weight).abs() <= 1.1 * step + 1e-6).all())
    symmetric = formula(stored(encoder_of("w4a16", (64, 256), 64, dtype), weight), 4)
    assert (found - weight).square().sum() < 0.97 * (symmetric - weight).square().sum()


def test_zero_points_are_nearest_by_the_scales_before_these_are_rounded() -> None:
    """As compressed-tensors computes them: those by the stored scales leave larger errors."""
    weight = normal((256, 4096))
    tensors = stored(encoder_of("w4a16-asym", (256, 4096), 64), weight)
    groups = weight.view(256, -1, 64)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    expected, otherwise = ((-low / scale).round() for scale in ((high - low) / 15, tensors[SCALE].float()))
    found = torch.from_numpy(unpacked(tensors[ZEROS].T.contiguous(), 256, 4).T.copy())
    assert torch.equal(found.float(), expected)
    assert not torch.equal(otherwise, expected)


@every_name
def test_a_scale_that_does_not_fit_float16_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="too large for a scale of float16"):
        stored(encoder_of(name, (64, 64), dtype="float16"), normal((64, 64), size=1e8))


@pytest.mark.parametrize("shape", [(64, 100), (1, 128), (3, 384), (2, 128, 3), (128,)], ids=str)
def test_what_is_not_whole_groups_does_not_fit(shape: tuple[int, ...]) -> None:
    assert not FORMATS["w4a16"].fits(W, shape)
    with pytest.raises(UnsupportedError, match=r"rows in groups of 128: exclude it"):
        FORMATS["w4a16"].encoder(W, shape, BF16)


# -- what compressed-tensors wrote -------------------------------------------------------------------------------


KINDS = {
    "w4a16": "w4a16, group size 32",
    "w8a16": "w8a16, group size 32",
    "w4a16_rows": "w4a16, a scale a row",
    "w4a16_asym": "w4a16-asym, group size 32",
    "w8a16_asym_rows": "w8a16, a scale a row, with zero points",
}
OF_ORDER = {
    "w4a16_act_order": "w4a16, group size 32, in activation order",
    "w4a16_asym_act_order": "w4a16-asym, group size 32, in activation order",
}
every_folder = pytest.mark.parametrize(
    "folder",
    [*(GOLDEN / name for name in KINDS), *(ORDERED / name for name in OF_ORDER)],
    ids=lambda f: f.name,
)


@pytest.mark.parametrize(("name", "stored_as"), KINDS.items())
def test_golden_files_are_decoded_exactly(name: str, stored_as: str, tmp_path: Path) -> None:
    folder = GOLDEN / name
    expected = read_tensors(folder / "expected.safetensors")
    found = {weight.name: weight for weight in find_weights(index_of(folder))}
    assert {name for name, weight in found.items() if weight.decoder.grid is not None} == set(expected)
    assert len(expected) == (6 if name == "w4a16" else 7)
    for each, values in expected.items():
        assert found[each].format == stored_as
        assert found[each].dtype.torch == values.dtype
        assert torch.equal(decoded(found[each]), values.float())
    streamconv.convert(folder, tmp_path / "dense", quant="none", device="cpu")
    dense = read_tensors(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(dense[each], values) for each, values in expected.items())
    assert not [each for each in dense if "weight_" in each]
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def whole_model(layer: Path, folder: Path) -> Path:
    """A model of one projection from `layer`, for adapters to name."""
    shutil.copytree(layer, folder)
    (folder / "expected.safetensors").unlink()
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    return folder


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


@pytest.mark.parametrize(("name", "stored_as"), OF_ORDER.items())
def test_columns_in_activation_order_are_decoded_as_their_library_does(name: str, stored_as: str) -> None:
    weight = only_weight(index_of(ORDERED / name))
    assert weight.format == stored_as
    assert torch.equal(decoded(weight), read_tensors(ORDERED / name / "expected.safetensors")[W].float())


def test_float32_products_are_rounded_once(tmp_path: Path) -> None:
    """Of zero points and activation order, too, where an element is a difference times a scale of 24 bits."""
    for name in OF_ORDER:
        tensors = read_tensors(ORDERED / name / "model.safetensors")
        tensors[SCALE] = torch.rand(tensors[SCALE].shape, generator=torch.Generator().manual_seed(2))
        config = json.loads((ORDERED / name / "config.json").read_text())
        weight = only_weight(write(tmp_path / name, tensors, config))
        assert torch.equal(decoded(weight), formula(tensors, 4))


@every_folder
def test_an_update_of_nothing_keeps_the_bytes(folder: Path, tmp_path: Path) -> None:
    """Codes, scales, zero points and order, whatever the group and the bits."""
    weight = next(each for each in find_weights(index_of(folder)) if each.name == W)
    encoder = weight.keep
    if encoder is None:
        kind, group = group_of(weight.format)
        assert group is not None
        encoder = with_groups(FORMATS[kind], group).encoder(W, weight.shape, weight.dtype)
    side, raw = side_parts(weight), raw_bytes(weight)
    scales = weight.decoder.scales(side)
    assert scales is not None
    assert encoder.grid == weight.decoder.grid
    assert encoder.format == weight.format
    assert torch.equal(encoder.effective_scales(scales), scales)
    again = torch.empty_like(raw)
    encoder.pack(weight.decoder.codes(raw, range(weight.shape[0])), scales, again)
    assert torch.equal(again, raw)
    file = read_tensors(folder / "model.safetensors")
    for contents in (encoder.finish(scales, None), encoder.finish(None, side)):
        for spec, content in zip(encoder.parts[1:], contents, strict=True):
            found = torch.frombuffer(bytearray(content), dtype=spec.dtype.torch).view(spec.shape)
            assert torch.equal(found, file[spec.name]), spec.name


@every_folder
def test_what_an_adapter_changes_keeps_the_layout_of_the_base(folder: Path, tmp_path: Path) -> None:
    base = ORDERED.parent / folder.parent.name / folder.name
    if folder.parent == ORDERED:
        base = whole_model(folder, tmp_path / "base")
    shape = next(each.shape for each in find_weights(index_of(base)) if each.name == W)
    before = read_tensors(base / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {W: (shape[0], shape[1])}, targets=("up_proj",))
    up = f"base_model.model.{W.removesuffix('.weight')}.lora_B.weight"
    only_first = torch.zeros(shape[0], 4)
    only_first[0] = 0.005
    edit_tensors(adapter / "adapter_model.safetensors", put={up: only_first})
    out = tmp_path / "merged"
    streamconv.merge(base, adapter, out, rounding="stochastic", device="cpu")
    after = read_tensors(out / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in after.items()
    }
    assert {name for name, tensor in before.items() if not torch.equal(tensor, after[name])} == {PACKED}
    assert torch.equal(before[PACKED][1:], after[PACKED][1:])
    assert {key: scheme(out).get(key) for key in SAID} == {key: scheme(base).get(key) for key in SAID}
    update = (
        only_first[0] @ read_tensors(adapter / "adapter_model.safetensors")[up.replace("lora_B", "lora_A")]
    )
    kept = (decoded_up(out) - decoded_up(base))[0]
    assert 0.7 < update @ kept / (update @ update) < 1.2


SAID = ("symmetric", "num_bits", "strategy", "group_size", "actorder")


def decoded_up(folder: Path) -> Tensor:
    return decoded(next(each for each in find_weights(index_of(folder)) if each.name == W))


def scheme(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights: dict[str, Any] = settings["config_groups"]["group_0"]["weights"]
    return weights


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
        ("config_groups", {"W4A4_ASYM": ["Linear"]}, UnsupportedError, "W4A4_ASYM is"),
        (
            "config_groups",
            {"W4A16_ASYM": ["Linear"]},
            CheckpointError,
            "4 bits, groups of 128, with zero points",
        ),
        (f"{GROUP}/format", "int-quantized", UnsupportedError, "group_0 has the format 'int-quantized'"),
        (f"{GROUP}/input_activations", {"num_bits": 8}, UnsupportedError, "group_0 quantizes activations"),
        (f"{GROUP}/weights/num_bits", 3, UnsupportedError, "group_0 has weights of 3 bits"),
        (f"{GROUP}/weights/type", "float", UnsupportedError, "4 bits, type 'float'"),
        (
            f"{GROUP}/weights/symmetric",
            False,
            CheckpointError,
            "config.json says 4 bits, .* with zero points",
        ),
        (f"{GROUP}/weights/strategy", "tensor", UnsupportedError, "group_0 has the strategy 'tensor'"),
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
        (ZEROS, torch.ones(8, 4).int(), UnsupportedError, "says that all weights are symmetric"),
        (ORDER, torch.ones(128), CheckpointError, r"found F32 \[128\], expected I32 \[128\]"),
        (ORDER, torch.arange(128).int() % 4, UnsupportedError, "has no weights in activation order"),
        (ORDER, torch.arange(128).int(), CheckpointError, "expected groups from 0 to 3"),
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


@pytest.mark.parametrize(
    ("zeros", "error", "message"),
    [
        (None, CheckpointError, "4 bits, groups of 32, and config.json says 4 bits, .*, with zero points"),
        (torch.ones(64, 4).char(), UnsupportedError, "zero points are not packed"),
        (torch.ones(8, 5).int(), CheckpointError, r"found I32 \[8, 5\], expected I32 \[8, 4\]"),
        (torch.ones(64, 4).int(), CheckpointError, r"found I32 \[64, 4\], expected I32 \[8, 4\]"),
    ],
)
def test_zero_points_that_do_not_agree_are_refused(
    tmp_path: Path, zeros: Tensor | None, error: type[StreamconvError], message: str
) -> None:
    tensors = stored(encoder_of("w4a16-asym", (64, 128)), normal((64, 128)))
    config = with_groups(FORMATS["w4a16-asym"], 32).quantization_config(BF16, (), ())
    del tensors[ZEROS]
    put = {} if zeros is None else {ZEROS: zeros}
    with pytest.raises(error, match=message):
        decode_every_weight(write(tmp_path, {**tensors, **put}, {"quantization_config": config}))


@pytest.mark.parametrize("order", [torch.full((128,), -1), torch.arange(128) // 32], ids=["none", "plain"])
def test_groups_in_the_order_of_columns_are_plain(tmp_path: Path, order: Tensor) -> None:
    """As files have them whose settings have an order that was never filled in."""
    tensors = stored(encoder_of("w4a16", (64, 128)), normal((64, 128)))
    config = with_groups(FORMATS["w4a16"], 32).quantization_config(BF16, (), ())
    folder = write(tmp_path, {**tensors, ORDER: order.int()}, {"quantization_config": config})
    assert only_weight(folder).format == "w4a16, group size 32"
    assert torch.equal(decoded(only_weight(folder)), formula(tensors, 4))


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
