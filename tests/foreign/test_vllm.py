"""vLLM on a CPU serves our files: its probabilities are those of transformers with what streamconv decodes.

`tools/foreign vllm` runs this. vLLM computes in 16 bits, so that it is near them and no more; its own distance with
nothing quantized stands beside the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import streamconv
from tests.foreign.readers import Case, decoded, divergence, keep, read_by, reference, small_llama

LIMIT = 1e-3  # nats a token
CASES: Mapping[str, Case] = {
    "bfloat16": Case({"quant": "bfloat16"}, dtype="bfloat16"),
    "w4a16": Case({"quant": "w4a16"}, dtype="bfloat16"),
    "w4a16, down_proj in 16 bit": Case({"quant": "w4a16", "ignore": ("mlp.down_proj",)}, dtype="bfloat16"),
    "gptq": Case({"quant": "gptq"}, dtype="float16"),
    "awq": Case({"quant": "awq"}, dtype="float16"),
}


@pytest.mark.foreign
@pytest.mark.timeout(3600)
def test_vllm_serves_what_streamconv_decodes(tmp_path: Path) -> None:
    base, out = small_llama(tmp_path / "base"), tmp_path / "answer.safetensors"
    whole = reference(base)
    models: dict[str, dict[str, Any]] = {}
    versions: Mapping[str, str] = {}
    for name, case in CASES.items():
        model, dense = tmp_path / name, tmp_path / f"{name} decoded"
        streamconv.convert(base, model, **case.options)
        decoded(model, dense, case.decoded_in)
        answer = read_by("vllm", model, out, dtype=case.dtype)
        models[name] = {
            "dtype": case.dtype,
            "divergence": divergence(reference(dense), answer.logits),
            "divergence_from_16_bit": divergence(whole, answer.logits),
        }
        versions = answer.versions
    keep("vllm", versions, models)
    assert max(found["divergence"] for found in models.values()) < LIMIT
