"""mlx-lm opens our folders: its weights equal what streamconv decodes, and its sums what transformers makes of that.

`tools/foreign mlx` runs this. What it computes in 16 bits, as it serves a model, is near that and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamconv.formats.stacks import FAMILIES
from tests.foreign.mixtures import MIXTURES, save_mixture, stacked
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
AS_SERVED_MIXTURE = 0.1
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
    mixtures = {f"mlx4, {family}": family for family in MIXTURES}
    for name, family in mixtures.items():
        base = save_mixture(tmp_path / family, family)
        outputs |= written({name: Case({"quant": "mlx4"})}, base, tmp_path)
    assert {*MIXTURES} == FAMILIES
    answers = read_by("mlx", outputs, tmp_path / "answers")
    models: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        dense = tmp_path / f"{name} decoded"
        expected = decoded(outputs[name], dense, CASES[name].decoded_in if name in CASES else "auto")
        if name in mixtures:
            expected = stacked(expected, mixtures[name])
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
    rounds = {name for name, case in CASES.items() if not case.is_exact}
    unread = {
        name: found["unequal"] for name, found in models.items() if found["unequal"] and name not in rounds
    }
    assert unread == {}
    for name, found in models.items():
        assert found["divergence"] < (AS_SERVED if name in rounds else IN_FLOAT32), name
        # Which experts a token comes to may change with the last bit.
        assert found["divergence_as_served"] < (AS_SERVED_MIXTURE if name in mixtures else AS_SERVED), name
