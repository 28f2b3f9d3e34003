"""mlx-lm opens our folders: weights equal what streamconv decodes, and it computes what transformers does with that.

`tools/foreign mlx` runs this. What it computes in 16 bits, as it serves a model, is near that and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests.foreign.readers import Case, decoded, divergence, keep, read_by, reference, small_llama, unequal

IN_FLOAT32 = 1e-8  # nats a token
AS_SERVED = 1e-3
CASES: Mapping[str, Case] = {
    "bfloat16": Case({"quant": "bfloat16"}),
    "float16": Case({"quant": "float16"}),
    # It makes float16 of everything, and a bias of each scale and zero point.
    "awq": Case({"quant": "awq"}, is_exact=False),
}


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_mlx_reads_what_streamconv_decodes(tmp_path: Path) -> None:
    base, out = small_llama(tmp_path / "base"), tmp_path / "answer.safetensors"
    models: dict[str, dict[str, Any]] = {}
    versions: Mapping[str, str] = {}
    for name, case in CASES.items():
        model, dense = tmp_path / name, tmp_path / f"{name} decoded"
        streamconv.convert(base, model, **case.options)
        expected = decoded(model, dense, case.decoded_in)
        answer = read_by("mlx", model, out)
        exact = reference(dense)
        models[name] = {
            "weights": len(expected),
            "unequal": unequal(expected, answer.weights),
            "divergence": divergence(exact, answer.more["logits_in_float32"]),
            "divergence_as_served": divergence(exact, answer.logits),
        }
        versions = answer.versions
    keep("mlx", versions, models)
    exact_ones = {name: models[name] for name, case in CASES.items() if case.is_exact}
    assert {name: found["unequal"] for name, found in exact_ones.items() if found["unequal"]} == {}
    assert max(found["divergence"] for found in exact_ones.values()) < IN_FLOAT32
    assert max(found["divergence_as_served"] for found in models.values()) < AS_SERVED
