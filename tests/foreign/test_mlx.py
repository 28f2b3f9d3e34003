"""mlx-lm opens our folders: its weights equal what streamconv decodes, and its sums what transformers makes of that.

`tools/foreign mlx` runs this. What it computes in 16 bits, as it serves a model, is near that and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.foreign.readers import (
    Case,
    decoded,
    divergence,
    keep,
    read_by,
    reference,
    refusal,
    small_llama,
    unequal,
    written,
)

IN_FLOAT32 = 1e-8  # nats a token
AS_SERVED = 0.05  # its CPU kernels of packed weights sum in 16 bits: 0.01 with the very weights of the files
CASES: Mapping[str, Case] = {
    "bfloat16": Case({"quant": "bfloat16"}),
    "float16": Case({"quant": "float16"}),
    "mlx4": Case({"quant": "mlx4"}),
    "mlx4, group 32": Case({"quant": "mlx4", "group_size": 32}),
    "mlx4, group 128": Case({"quant": "mlx4", "group_size": 128}),
    "mlx8": Case({"quant": "mlx8"}),
    # It makes float16 of everything, and a bias of each scale and zero point.
    "awq": Case({"quant": "awq"}, is_exact=False),
    "awq-asym": Case({"quant": "awq-asym"}, is_exact=False),
}

REFUSED = ("gptq", "gptq-asym")


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_mlx_reads_what_streamconv_decodes(tmp_path: Path) -> None:
    outputs = written(CASES, small_llama(tmp_path / "base"), tmp_path)
    answers = read_by("mlx", outputs, tmp_path / "answers")
    models: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        dense = tmp_path / f"{name} decoded"
        expected = decoded(outputs[name], dense, CASES[name].decoded_in)
        exact = reference(dense)
        models[name] = {
            "weights": len(expected),
            "unequal": unequal(expected, answer.weights),
            "divergence": divergence(exact, answer.more["logits_in_float32"]),
            "divergence_as_served": divergence(exact, answer.logits),
        }
    others = written({name: Case({"quant": name}) for name in REFUSED}, tmp_path / "base", tmp_path)
    refused = {name: refusal("mlx", model) for name, model in others.items()}
    keep("mlx", answers["bfloat16"].versions, models, refused)
    exact_ones = {name: models[name] for name, case in CASES.items() if case.is_exact}
    assert {name: found["unequal"] for name, found in exact_ones.items() if found["unequal"]} == {}
    for name, found in models.items():
        assert found["divergence"] < (IN_FLOAT32 if CASES[name].is_exact else AS_SERVED), name
        assert found["divergence_as_served"] < AS_SERVED, name
