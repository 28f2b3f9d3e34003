"""transformers, with compressed-tensors and bitsandbytes, reads from our files exactly what streamconv decodes them to.

`tools/foreign transformers` runs this. Golden files are opened too: they are dequantized to what is kept there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

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
    written,
)
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import read_tensors

IN_FLOAT32 = 1e-9  # nats a token
CASES: Mapping[str, Case] = {
    "bfloat16": Case({"quant": "bfloat16"}),
    "nf4": Case({"quant": "nf4"}),
    "nf4-dq": Case({"quant": "nf4-dq"}),
    "fp4": Case({"quant": "fp4"}),
    "int8": Case({"quant": "int8"}),
    "w4a16": Case({"quant": "w4a16"}),
    "w4a16, group 32": Case({"quant": "w4a16", "group_size": 32}),
    "w4a16, down_proj in 16 bit": Case({"quant": "w4a16", "ignore": ("mlp.down_proj",)}),
    "w4a16-asym": Case({"quant": "w4a16-asym"}),
    "w4a16-asym, group 32": Case({"quant": "w4a16-asym", "group_size": 32}),
    "w8a16": Case({"quant": "w8a16"}),
    "w8a8": Case({"quant": "w8a8"}),
    "fp8": Case({"quant": "fp8"}),
    "fp8-block": Case({"quant": "fp8-block"}),
    "nvfp4a16": Case({"quant": "nvfp4a16"}),
    "mxfp4a16": Case({"quant": "mxfp4a16"}),
    "mxfp4": Case({"quant": "mxfp4"}),
}
GOLDEN_FILES = [
    *sorted((GOLDEN / "compressed-tensors-0.20.0").iterdir()),
    *sorted((GOLDEN / "transformers-5.23.0").iterdir()),
]


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_transformers_reads_what_streamconv_decodes(tmp_path: Path) -> None:
    base = small_llama(tmp_path / "base")
    save_tokenizer(base)
    write_text(tmp_path / "text.txt", 2000)
    text = {"calibration": tmp_path / "text.txt", "calibration_tokens": 512, "rounding": "nearest"}
    measured = Case({"quant": "nvfp4", **text, "calibration_sequence_length": 64})
    cases = {**CASES, "nvfp4": measured}
    outputs = written(cases, base, tmp_path)
    golden = {f"{folder.parent.name}/{folder.name}": folder for folder in GOLDEN_FILES}
    answers = read_by("transformers", outputs | golden, tmp_path / "answers")
    models: dict[str, dict[str, Any]] = {}
    for name, model in outputs.items():
        dense = tmp_path / f"{name} decoded"
        expected = decoded(model, dense, cases[name].decoded_in)
        models[name] = {
            "weights": len(expected),
            "unequal": unequal(expected, answers[name].weights),
            "divergence": divergence(reference(dense), answers[name].logits),
        }
    for name, folder in golden.items():
        expected = {key: each.float() for key, each in read_tensors(folder / "expected.safetensors").items()}
        models[name] = {"weights": len(expected), "unequal": unequal(expected, answers[name].weights)}
    keep("transformers", answers["bfloat16"].versions, models)
    assert {name: found["unequal"] for name, found in models.items() if found["unequal"]} == {}
    assert max(models[name]["divergence"] for name in cases) < IN_FLOAT32
