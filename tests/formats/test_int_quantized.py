"""compressed-tensors' int-quantized storage: the library's own values, and files that say otherwise than they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file

import streamconv
from streamconv.dtypes import BF16, F32
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import Json
from streamconv.formats.int_quantized import Int8TensorEncoder
from tests.checkpoint.files import index_of
from tests.formats.stored import (
    W,
    decode_every_weight,
    decoded,
    encoder_for,
    normal,
    only_weight,
    side_parts,
    stored,
    write,
)
from tests.models import write_adapter
from tests.tiny import edit_tensors

MODULE = W.removesuffix("weight")
GOLDEN = Path(__file__).parent.parent / "golden" / "compressed-tensors-0.20.0"
KINDS = {
    "w8a8": "w8a8",
    "w8a8_tensor": "w8a8, a scale a tensor, static activations",
    "w8a8_static_asym": "w8a8, static asymmetric activations",
}
every_golden = pytest.mark.parametrize("name", KINDS)


def config(**changes: Any) -> Json:
    found = FORMATS["w8a8"].quantization_config(BF16, (), ())
    assert found is not None
    return {"quantization_config": found | changes}


@every_golden
def test_values_are_those_of_the_library(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")
    weights = [each for each in find_weights(index_of(GOLDEN / name)) if each.decoder.grid is not None]
    assert len(weights) > 5
    for weight in weights:
        assert weight.format == KINDS[name]
        assert torch.equal(decoded(weight), expected[weight.name].float()), weight.name


@every_golden
def test_what_an_adapter_changes_keeps_scales_of_weights_and_activations(name: str, tmp_path: Path) -> None:
    """And what it does not change, its bytes."""
    shape = next(each.shape for each in find_weights(index_of(GOLDEN / name)) if each.name == W)
    adapter = write_adapter(tmp_path / "adapter", {W: (shape[0], shape[1])}, targets=("up_proj",))
    up = f"base_model.model.{MODULE}lora_B.weight"
    only_first = torch.zeros(shape[0], 4)
    only_first[0] = 0.005
    edit_tensors(adapter / "adapter_model.safetensors", put={up: only_first})
    before = load_file(GOLDEN / name / "model.safetensors")
    streamconv.merge(GOLDEN / name, adapter, tmp_path / "out", rounding="stochastic", device="cpu")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {each for each, tensor in before.items() if not torch.equal(tensor, after[each])} == {W}
    assert torch.equal(before[W][1:], after[W][1:])
    said = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        for folder in (GOLDEN / name, tmp_path / "out")
    ]
    for key in ("num_bits", "strategy", "dynamic", "symmetric"):
        for part in ("weights", "input_activations"):
            assert said[0][part][key] == said[1][part][key]


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_one_scale_is_that_of_the_greatest_magnitude(size: float, tmp_path: Path) -> None:
    """Codes to the nearest, as the library has it; and with targets beyond the base's scale, it is a new one."""
    weight = next(each for each in find_weights(index_of(GOLDEN / "w8a8_tensor")) if each.name == W)
    assert isinstance(weight.keep, Int8TensorEncoder)
    assert not weight.keep.is_known
    target = normal((weight.shape[0], weight.shape[1]), size=size)
    encoder = weight.keep.knowing(float(target.abs().max()))
    tensors = stored(encoder, target)
    args = QuantizationArgs(num_bits=8, strategy="tensor")
    scale, _ = calculate_qparams(target.amin().view(1), target.amax().view(1), args)
    expected = scale.bfloat16() if size else torch.ones(1).bfloat16()
    assert torch.equal(tensors[f"{MODULE}weight_scale"], expected)
    codes = (target / expected.float()).round().clamp(-128, 127)
    assert ((tensors[W].float() - codes).abs() > 0).float().mean() < 0.01
    # bfloat16 is too coarse to tell 127 from 127.5 by one of them.
    stored_scale = replace(weight.keep, dtype=F32).knowing(3.0).effective_scales(torch.ones(1)) / 128
    assert torch.equal(stored_scale, torch.full((1,), 3.0 / 127.5))
    scales = weight.decoder.scales(side_parts(weight))
    assert scales is not None
    assert encoder.outgrows(scales) == (size == 1.0)


def test_asymmetric_weights_are_copied_and_refused_where_an_update_touches_them(tmp_path: Path) -> None:
    base = GOLDEN / "w8a8_asym_weights"
    streamconv.convert(base, tmp_path / "copied", device="cpu")
    copied = tmp_path / "copied" / "model.safetensors"
    assert copied.read_bytes() == (base / "model.safetensors").read_bytes()
    adapter = write_adapter(tmp_path / "adapter", {W: (32, 64)}, targets=("up_proj",))
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight, which is not decoded: .* are asymmetric"):
        streamconv.merge(base, adapter, tmp_path / "out", device="cpu")


def test_what_is_written_is_what_the_library_decompresses(tmp_path: Path) -> None:
    weight = normal((96, 130))
    tensors = stored(encoder_for("w8a8", weight), weight)
    ours = decoded(only_weight(write(tmp_path, tensors, config())))
    group = config()["quantization_config"]["config_groups"]["group_0"]
    parts = {name.removeprefix(MODULE): tensor for name, tensor in tensors.items()}
    theirs = IntQuantizationCompressor.decompress(parts, QuantizationScheme(**group))["weight"]
    assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("shape", [(1,), ()], ids=str)
def test_one_scale_may_be_that_of_all_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (70, 30)).to(torch.int8)
    tensors = {
        W: codes,
        f"{MODULE}weight_scale": torch.full(shape, 0.03),
        f"{MODULE}input_scale": torch.ones(1),
    }
    settings = config()
    settings["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    weight = only_weight(write(tmp_path, tensors, settings))
    assert torch.equal(decoded(weight), codes * torch.tensor(0.03))
    assert weight.format == "w8a8, a scale a tensor"
    assert set(weight.parts) == {"weight", "weight_scale", "input_scale"}


def test_scales_in_one_axis_stay_so(tmp_path: Path) -> None:
    tensors = {W: torch.randint(-128, 128, (70, 30)).to(torch.int8), f"{MODULE}weight_scale": torch.rand(70)}
    weight = only_weight(write(tmp_path, tensors, config()))
    assert weight.format == "w8a8, scales in one axis"
    assert torch.equal(decoded(weight), tensors[W] * tensors[f"{MODULE}weight_scale"][:, None])
    assert weight.keep is not None
    assert weight.keep.parts[1].shape == (70,)


def test_scales_that_the_config_does_not_speak_of_are_refused(tmp_path: Path) -> None:
    tensors = {W: torch.ones(6, 4, dtype=torch.int8), f"{MODULE}weight_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"strategy tensor, and config\.json says channel"):
        find_weights(write(tmp_path, tensors, config()))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"weight_scale": torch.ones(5, 1)},
            r"weight_scale: found F32 \[5, 1\], expected a float type and \[6, 1\]",
        ),
        ({"weight_scale": torch.ones(6, 1, dtype=torch.int32)}, "weight_scale: found I32"),
        (
            {"weight_scale": torch.ones(6, 1), "weight_zero_point": torch.ones(6, 1)},
            "integers are asymmetric",
        ),
        (
            {"weight": torch.ones(2, 3, 4, dtype=torch.int8), "weight_scale": torch.ones(2, 1)},
            r"expected I8 \[out",
        ),
    ],
    ids=range(4),
)
def test_parts_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    found = {"weight": torch.ones(6, 4, dtype=torch.int8)} | tensors
    index = write(tmp_path, {MODULE + role: each for role, each in found.items()}, config())
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        decode_every_weight(index)


@pytest.mark.parametrize("change", [{"num_bits": 4}, {"type": "float"}, {"strategy": "group"}], ids=str)
def test_settings_of_other_weights_are_refused(change: Json, tmp_path: Path) -> None:
    weight, settings = normal((6, 4)), config()
    settings["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(UnsupportedError, match="compressed-tensors"):
        decode_every_weight(write(tmp_path, stored(encoder_for("w8a8", weight), weight), settings))


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    scales = torch.ones(6, 1)
    scales[3] = torch.nan
    index = write(
        tmp_path, {W: torch.ones(6, 4, dtype=torch.int8), f"{MODULE}weight_scale": scales}, config()
    )
    weight = only_weight(index)
    with pytest.raises(CheckpointError, match="a stored scale is NaN"):
        weight.decoder.scales(side_parts(weight))
