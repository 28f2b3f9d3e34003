"""How a weight lies is told by its shape, else by the model, and by `fan_in_fan_out` last."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.adapters.base import Parameter
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters
from streamconv.checkpoint.types import Shape
from streamconv.errors import UnsupportedError


def told(
    shape: Shape,
    outputs: int | None,
    inputs: int | None,
    layer: str = "c_fc",
    model_type: object = "llama",
    **fields: Any,
) -> bool | None:
    parameter = Parameter(f"transformer.h.0.mlp.{layer}.weight", shape)
    config, base = (
        AdapterConfig("adapter_config.json", fields, b""),
        BaseParameters({}, {"model_type": model_type}, None),
    )
    return is_transposed(parameter, shape, outputs, inputs, config, base)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("shape", "outputs", "inputs", "expected"),
    [
        ((6, 4), 6, 4, False),
        ((6, 4), 4, 6, True),
        ((6, 4), 6, None, False),
        ((6, 4), None, 6, True),
        ((6, 4), 6, 5, None),
        ((6, 4), None, 5, None),
        ((6, 4, 3, 3), 6, 4, None),
        ((6,), 6, None, None),
    ],
)
def test_the_shape_decides_whatever_flag_and_model_say(
    shape: Shape, outputs: int | None, inputs: int | None, expected: bool | None, model_type: str, flag: bool
) -> None:
    assert told(shape, outputs, inputs, model_type=model_type, fan_in_fan_out=flag) is expected


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("layer", "expected"), [("c_attn", True), ("c_fc", True), ("lm_head", False)])
@pytest.mark.parametrize(("shape", "side"), [((4, 4), 4), ((6, 4), None)])
def test_where_both_fit_a_model_of_conv1d_decides_whatever_the_flag_says(
    shape: Shape, side: int | None, layer: str, expected: bool, flag: bool
) -> None:
    assert told(shape, side, side, layer, "gpt2", fan_in_fan_out=flag) is expected


@pytest.mark.parametrize("model_type", ["llama", None, ["gpt2"]])
def test_a_flag_that_another_model_contradicts_is_refused(model_type: object) -> None:
    assert told((4, 4), 4, 4, model_type=model_type, fan_in_fan_out=False) is False
    assert told((4, 4), 4, 4, model_type=model_type) is False
    with pytest.raises(UnsupportedError, match=r"c_fc\.weight is square, so its shape does not tell"):
        told((4, 4), 4, 4, model_type=model_type, fan_in_fan_out=True)
    with pytest.raises(UnsupportedError, match=r"fits either way.*set fan_in_fan_out to false"):
        told((6, 4), None, None, model_type=model_type, fan_in_fan_out=True)
