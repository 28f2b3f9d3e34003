"""transformers, with compressed-tensors and bitsandbytes, reads from our files exactly what streamconv decodes them to.

`tools/foreign transformers` runs this. Golden files are opened too: they are dequantized to what is kept there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests.foreign.readers import (
    GOLDEN,
    Case,
    decoded,
    divergence,
    keep,
    read_by,
    reference,
    small_llama,
    unequal,
)
from tests.tiny import read_tensors

CASES: Mapping[str, Case] = {
    "bfloat16": Case({"quant": "bfloat16"}),
    "nf4": Case({"quant": "nf4"}),
    "nf4-dq": Case({"quant": "nf4-dq"}),
    "fp4": Case({"quant": "fp4"}),
    "int8": Case({"quant": "int8"}),
    "w4a16": Case({"quant": "w4a16"}),
    "w4a16, group 32": Case({"quant": "w4a16", "group_size": 32}),
    "w4a16, down_proj in 16 bit": Case({"quant": "w4a16", "ignore": ("mlp.down_proj",)}),
    "w8a16": Case({"quant": "w8a16"}),
}
GOLDEN_FILES = [
    *sorted((GOLDEN / "compressed-tensors-0.20.0").iterdir()),
    *sorted((GOLDEN / "transformers-5.23.0").iterdir()),
]


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_transformers_reads_what_streamconv_decodes(tmp_path: Path) -> None:
    base, out = small_llama(tmp_path / "base"), tmp_path / "answer.safetensors"
    models: dict[str, dict[str, Any]] = {}
    versions: Mapping[str, str] = {}
    for name, case in CASES.items():
        model, dense = tmp_path / name, tmp_path / f"{name} decoded"
        streamconv.convert(base, model, **case.options)
        expected = decoded(model, dense, case.decoded_in)
        answer = read_by("transformers", model, out, dtype=case.dtype)
        models[name] = {
            "weights": len(expected),
            "unequal": unequal(expected, answer.weights),
            "divergence": divergence(reference(dense), answer.logits),
        }
        versions = answer.versions
    for folder in GOLDEN_FILES:
        expected = {key: each.float() for key, each in read_tensors(folder / "expected.safetensors").items()}
        answer = read_by("transformers", folder, out)
        name = f"{folder.parent.name}/{folder.name}"
        models[name] = {"weights": len(expected), "unequal": unequal(expected, answer.weights)}
    keep("transformers", versions, models)
    assert {name: found["unequal"] for name, found in models.items() if found["unequal"]} == {}
    assert max(models[name]["divergence"] for name in CASES) < 1e-9
