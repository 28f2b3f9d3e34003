"""compressed-tensors' int-quantized storage: the library's own values, and files that say otherwise than they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file

from streamconv.dtypes import BF16
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import Json
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

MODULE = W.removesuffix("weight")
GOLDEN = Path(__file__).parent.parent / "golden" / "compressed-tensors-0.20.0" / "w8a8"


def config(**changes: Any) -> Json:
    found = FORMATS["w8a8"].quantization_config(BF16, (), ())
    assert found is not None
    return {"quantization_config": found | changes}


def test_values_are_those_of_the_library() -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    weights = [each for each in find_weights(index_of(GOLDEN)) if each.decoder.grid is not None]
    assert len(weights) > 5
    for weight in weights:
        assert weight.format == "w8a8"
        assert torch.equal(decoded(weight), expected[weight.name].float()), weight.name


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
        find_weights(index)


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
