"""What is told once a class is what `isinstance` says of each of its encoders."""

from __future__ import annotations

import pytest

from streamconv.dtypes import BF16
from streamconv.formats import FORMATS
from streamconv.formats.base import InputMeasured, Surveyed
from streamconv.formats.kinds import is_input_measured, is_surveyed


@pytest.mark.parametrize("name", FORMATS)
def test_every_encoder_is_told_as_it_is(name: str) -> None:
    encoder = FORMATS[name].encoder("layers.0.mlp.up_proj.weight", (256, 256), BF16)
    for _ in range(2):
        assert is_surveyed(encoder) is isinstance(encoder, Surveyed)
        assert is_input_measured(encoder) is isinstance(encoder, InputMeasured)


def test_there_are_encoders_of_each_kind_and_of_neither() -> None:
    encoders = {
        name: FORMATS[name].encoder("layers.0.mlp.up_proj.weight", (256, 256), BF16)
        for name in ("nvfp4", "bfloat16")
    }
    assert is_surveyed(encoders["nvfp4"])
    assert is_input_measured(encoders["nvfp4"])
    assert not is_surveyed(encoders["bfloat16"])
    assert not is_input_measured(encoders["bfloat16"])
    assert not is_surveyed(None)
