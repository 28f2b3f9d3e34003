from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamconv.dtypes import BF16, DENSE, F16
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS, find_weights
from tests.formats.stored import W, decoded, encoder_for, normal, only_weight, stored, write

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)], ids=str)
def test_reads_what_is_stored(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = normal(shape).to(dtype)
    weight = only_weight(write(tmp_path, {W: tensor}))
    assert (weight.name, weight.shape, weight.dtype.torch) == (W, shape, dtype)
    assert weight.format == str(dtype).removeprefix("torch.")
    assert torch.equal(decoded(weight), tensor.float())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rounds_once_as_torch_does(dtype: torch.dtype) -> None:
    weight = normal((70, 9), size=1000.0)
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(stored(encoder_for(name, weight), weight)[W], weight.to(dtype))


def test_an_overflow_of_float16_becomes_infinite() -> None:
    weight = torch.tensor([[65519.0, 65520.0]])
    assert stored(encoder_for("float16", weight), weight)[W].isinf().tolist() == [[False, True]]


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6).view(2, 3), torch.tensor([True, False]), torch.ones(3, dtype=torch.float64)],
    ids=["int64", "bool", "float64"],
)
def test_other_types_can_be_copied_and_no_more(tmp_path: Path, tensor: Tensor) -> None:
    weight = only_weight(write(tmp_path, {"buffer": tensor}))
    assert weight.format not in FORMATS
    assert (
        weight.decoder.row_offset(1)
        == tensor[..., :].numel() // math.prod(tensor.shape[:-1]) * tensor.itemsize
    )
    with pytest.raises(UnsupportedError, match="buffer"):
        decoded(weight)


def test_a_dense_format_needs_no_config_and_has_its_own_type() -> None:
    assert FORMATS["float16"].quantization_config(F16, (), ["lm_head"]) is None
    encoder = FORMATS["float16"].encoder(W, (2, 3), BF16)
    assert encoder.dtype == F16
    assert [spec.name for spec in encoder.parts] == [W]
    assert encoder.finish(None, None) == ()


def test_every_dense_type_has_a_format(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.zeros(2, 2, dtype=dtype.torch) for name, dtype in DENSE.items()}
    found = {weight.name: weight.format for weight in find_weights(write(tmp_path, tensors))}
    assert found == {f"{name}.weight": name for name in DENSE}
