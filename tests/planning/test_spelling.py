"""What people type for formats and element types is taken for what it means, or they are told what it may mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamconv.errors import OptionError
from streamconv.formats import FORMATS
from streamconv.pipeline import merge_options
from streamconv.planning.options import MERGE_DEFAULTS
from streamconv.planning.spelling import format_name, meant_by, type_name


@pytest.mark.parametrize("name", [*FORMATS, "keep", "none", "something"])
def test_names_as_they_are_stay(name: str) -> None:
    assert format_name(name) == name
    assert format_name(name.upper()) == name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("bf16", "bfloat16"),
        ("f16", "float16"),
        ("half", "float16"),
        (torch.bfloat16, "bfloat16"),
        ("nf4_dq", "nf4-dq"),
        ("nf4dq", "nf4-dq"),
        ("merged_16bit", "none"),
        ("merged_4bit", "nf4-dq"),
        ("q4_k_m", "gguf:q4_k_m"),
        ("Q8_0", "gguf:q8_0"),
        ("gguf-q5_k_m", "gguf:q5_k_m"),
        ("mlx-4bit", "mlx4"),
        ("fp8_block", "fp8-block"),
    ],
)
def test_one_meaning_is_taken(typed: object, meant: str) -> None:
    assert format_name(typed) == meant


@pytest.mark.parametrize("typed", ["bf16", "BFloat16", torch.bfloat16, "torch.bfloat16"])
def test_types_may_be_those_of_torch(typed: Any) -> None:
    assert type_name(typed) == "bfloat16"
    assert merge_options(**{**MERGE_DEFAULTS, "dtype": typed}).dtype == "bfloat16"


@pytest.mark.parametrize("typed", ["4bit", "int4", "8-bit", "gguf", "mlx", "load_in_4bit", "bitsandbytes"])
def test_of_several_meanings_all_are_formats(typed: str) -> None:
    message = meant_by("--quant", typed)
    assert message.startswith(f"--quant {typed} may be one of several formats; use ")
    words = message.replace(",", "").replace("(", "").split()
    assert len(set(words) & {*FORMATS}) >= 2
    assert not set(words) & {"q4_k_m", "w4a16:g64"}


def test_what_is_spelt_alike_is_offered() -> None:
    assert "did you mean gptq" in meant_by("--quant", "gptqq", ["keep"])
    assert "use keep, or a format that `streamconv formats` lists" in meant_by("--quant", "gptqq", ["keep"])
    assert "did you mean" not in meant_by("--quant", "zzzzzz")


@pytest.mark.parametrize("also", ["4bit", "zzzzzz"])
def test_a_further_format_that_is_none_is_refused(also: str) -> None:
    with pytest.raises(OptionError, match=f"--also {also} "):
        from_also(also)


def from_also(also: str) -> None:
    from streamconv.pipeline import build_job

    build_job("base", "adapter", also=[also])
