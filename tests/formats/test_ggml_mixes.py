"""Tensors get the types that llama.cpp's quantizer gives them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamconv.formats.ggml_mixes import MIXES, MixedModel, fitting_type, is_quantized, mixed_type
from streamconv.kernels.ggml import BLOCK_TYPES

GOLDEN = Path(__file__).parents[1] / "golden" / "ggml" / "mixes.json"
CASES: Mapping[str, Any] = json.loads(GOLDEN.read_text())["cases"]


def axes_of(case: Mapping[str, Any]) -> Mapping[str, int]:
    """Axes of all tensors, by name."""
    found = {}
    for end, count in case["axes"].items():
        if end in ("token_embd.weight", "output_norm.weight", "output.weight"):
            found[end] = count
            continue
        skipped = case["without_values"] if end.startswith(("attn_k", "attn_v")) else ()
        found |= {f"blk.{layer}.{end}": count for layer in range(case["layers"]) if layer not in skipped}
    return found


def model_of(case: Mapping[str, Any]) -> MixedModel:
    facts = case["architecture"], case["layers"], case["experts"], 4, case["key_heads"]
    return MixedModel.of(axes_of(case), *facts)


@pytest.mark.parametrize("name", CASES)
def test_types_are_those_of_llama_cpp(name: str) -> None:
    case = CASES[name]
    model, axes = model_of(case), axes_of(case)
    for mix, letters in case["mixes"].items():
        expected = {
            tensor: case["types"][ord(letter) - ord("a")]
            for tensor, letter in zip(sorted(axes), letters, strict=True)
        }
        found = {
            # The rest has the type that it has in the file, here float32.
            tensor: mixed_type(MIXES[mix], tensor, case["columns"], model)
            if is_quantized(tensor, count)
            else "f32"
            for tensor, count in axes.items()
        }
        assert found == expected, mix


def test_mixes_say_what_the_files_are() -> None:
    gguf = importlib.import_module("gguf")
    for name, mix in MIXES.items():
        known = gguf.LlamaFileType(mix.file_type).name
        assert known == ("ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}")


def test_importance_gives_the_first_last_projections_an_offset() -> None:
    names = [f"blk.{layer}.ffn_down.weight" for layer in range(16)]
    model = MixedModel.of(names, "llama", 16, 0, 4, 4)
    for mix, first in (("q4_0", "q4_1"), ("q5_0", "q5_1"), ("q8_0", "q8_0")):
        types = [mixed_type(MIXES[mix], name, 256, model, has_importance=True) for name in names]
        assert types == [first] * 2 + [mix] * 14


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 576, "q5_0"),
        ("q5_k", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        ("iq2_s", 576, "iq4_nl"),
        ("q2_k", 32, "q4_0"),
        ("q4_0", 48, "f16"),
        ("q4_k", 48, "f16"),
    ],
)
def test_rows_that_are_no_whole_super_blocks_get_shorter_blocks(
    name: str, columns: int, expected: str
) -> None:
    assert fitting_type(name, columns) == expected


def test_mixes_of_floats_are_of_them_alone() -> None:
    model = MixedModel.of(["output.weight"], "llama", 1, 0, 4, 4)
    for name in ("f32", "f16", "bf16"):
        assert mixed_type(MIXES[name], "output.weight", 48, model) == name


def test_all_types_of_mixes_are_known() -> None:
    for mix in MIXES.values():
        assert {mix.base, mix.more or mix.base, mix.first or mix.base, mix.output or mix.base} <= {
            *BLOCK_TYPES
        }


@pytest.mark.parametrize(
    ("tensor", "axes", "expected"),
    [
        ("blk.0.attn_q.weight", 2, True),
        ("blk.0.ffn_down_exps.weight", 3, True),
        ("blk.0.attn_norm.weight", 1, False),
        ("blk.0.ffn_gate_inp.weight", 2, False),
        ("blk.0.ffn_down_exps.bias", 2, False),
        ("blk.0.ssm_conv1d.weight", 2, False),
        ("position_embd.weight", 2, False),
    ],
)
def test_norms_routers_and_biases_keep_their_types(tensor: str, axes: int, expected: bool) -> None:
    assert is_quantized(tensor, axes) is expected
