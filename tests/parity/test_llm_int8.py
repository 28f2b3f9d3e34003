"""LLM.int8: bitsandbytes' arithmetic is the reference, to the last bit, but for its cast to float16 beforehand."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from torch import Tensor
from transformers import BitsAndBytesConfig

from streamconv.dtypes import BF16
from streamconv.formats import FORMATS, find_weights
from tests.formats.stored import SHAPES, W, decoded, encoder_for, normal, only_weight, stored, write
from tests.tiny import read_tensors

P = W.removesuffix("weight")
every_shape = pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (1, 1), (200, 130)], ids=str)
every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def awkward(shape: tuple[int, int]) -> Tensor:
    """Rows of zeros, of tiny and of large values, and of halves between integers."""
    weight = normal(shape, seed=3)
    halves = (torch.arange(shape[1]) % 127 - 63) + 0.5
    rows = [torch.zeros(shape[1]), halves.clone().index_fill_(0, torch.tensor(0), 127.0), -halves * 0.0]
    rows += [normal((shape[1],), 1, 1e-3), normal((shape[1],), 2, 1e4).clamp(-6e4, 6e4)]
    for row, content in zip(range(shape[0]), rows, strict=False):
        weight[row] = content
    return weight


def ours(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return stored(encoder_for("int8", weight, dtype), weight.float())


def linear8bit(weight: Tensor) -> bnb.nn.Linear8bitLt:
    """A module of bitsandbytes that holds `weight`, cast to float16 and quantized."""
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


@every_shape
@every_type
@pytest.mark.parametrize("is_awkward", [False, True], ids=["normal", "awkward"])
def test_nearest_codes_and_scales_are_equal(
    shape: tuple[int, int], dtype: torch.dtype, is_awkward: bool
) -> None:
    weight = (awkward(shape) if is_awkward else normal(shape)).to(dtype)
    codes, scales, _ = int8_vectorwise_quant(weight.float())
    tensors = ours(weight, dtype)
    assert torch.equal(tensors[W], codes)
    assert torch.equal(tensors[f"{P}SCB"], scales)


@every_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_become_the_state_dict_of_a_linear8bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Its cast to float16 rounds no value of theirs that matters."""
    weight = normal(shape).to(dtype)
    theirs, tensors = linear8bit(weight).state_dict(), ours(weight, dtype)
    assert {f"{P}{key}" for key in theirs} == set(tensors)
    for key, tensor in theirs.items():
        assert (tensors[P + key].dtype, tensors[P + key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(tensors[P + key], tensor)


def test_float32_weights_differ_where_the_cast_to_float16_moved_them() -> None:
    weight = normal((512, 512))
    found, expected = ours(weight, torch.float32)[W].int(), linear8bit(weight).state_dict()["weight"].int()
    assert int((found - expected).abs().max()) == 1
    assert 0.005 < float((found != expected).float().mean()) < 0.01


def test_rows_beyond_float16_are_finite() -> None:
    weight = torch.full((2, 8), 0.5).bfloat16()
    weight[0, 3] = 1e5
    assert linear8bit(weight).state_dict()["SCB"].tolist() == [float("inf"), 0.5]
    tensors = ours(weight, torch.bfloat16)
    assert tensors[f"{P}SCB"].tolist() == [float(weight[0, 3]), 0.5]
    assert tensors[W].tolist() == [[0, 0, 0, 127, 0, 0, 0, 0], [127] * 8]


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38, 1e-44])
def test_no_row_is_too_small(tmp_path: Path, size: float) -> None:
    """bitsandbytes' factor of 127 / 1e-38 is infinite; values then turn to whatever a cast of infinity gives."""
    weight = torch.tensor([[size, -size, size / 2, 0.0]])
    read = decoded(only_weight(write(tmp_path, ours(weight, torch.float32))))
    assert bool(((read - weight).abs() <= max(size / 127, 1e-36)).all())


@every_shape
@every_type
def test_it_dequantizes_our_file_to_our_values(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    index = write(tmp_path, ours(awkward(shape).to(dtype), dtype))
    tensors = read_tensors(tmp_path / "model.safetensors")
    theirs = int8_vectorwise_dequant(tensors[W], tensors[f"{P}SCB"])
    assert torch.equal(decoded(only_weight(index)), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_we_read_the_state_dict_of_a_linear8bit(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = linear8bit(normal((70, 95)).bfloat16())
    tensors = {f"layer.{key}": value for key, value in layer.state_dict().items()}
    found = find_weights(write(tmp_path, tensors | {"norm.weight": torch.ones(3, dtype=dtype)}))
    (weight,) = (weight for weight in found if weight.name == "layer.weight")
    assert (weight.shape, weight.format) == ((70, 95), "int8")
    assert weight.dtype.torch == dtype  # the file does not say what it was
    theirs = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert torch.equal(decoded(weight), theirs)


def test_every_code_a_file_may_hold_is_decoded_as_it_does(tmp_path: Path) -> None:
    """-128 among them, which no rounding chooses."""
    codes = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    scales = torch.tensor([0.3, 7e-5])
    weight = only_weight(write(tmp_path, {W: codes, f"{P}SCB": scales}))
    assert torch.equal(decoded(weight), int8_vectorwise_dequant(codes, scales))


def test_the_config_is_what_transformers_writes() -> None:
    theirs = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert FORMATS["int8"].quantization_config(BF16, (), ["lm_head"]) == theirs.to_dict()
