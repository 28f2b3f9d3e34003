"""vLLM on a CPU serves our files: its probabilities are those of transformers with what streamconv decodes.

`tools/foreign vllm` runs this. vLLM computes in 16 bits, so that it is near them and no more; its own distance with
nothing quantized stands beside the others.
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
    written,
)

LIMIT = 1e-3  # nats a token
# What layers are given is rounded to 8 bits as the model is served, a scale a token.
ACTIVATIONS_OF_8_BITS = ("w8a8", "fp8")
EIGHT_BIT_SUMS = 0.1
CASES: Mapping[str, Case] = {
    "bfloat16": Case({"quant": "bfloat16"}, dtype="bfloat16"),
    "w4a16": Case({"quant": "w4a16"}, dtype="bfloat16"),
    "w4a16, down_proj in 16 bit": Case({"quant": "w4a16", "ignore": ("mlp.down_proj",)}, dtype="bfloat16"),
    "w4a16-asym": Case({"quant": "w4a16-asym"}, dtype="bfloat16"),
    "gptq": Case({"quant": "gptq"}, dtype="float16"),
    "awq": Case({"quant": "awq"}, dtype="float16"),
    "awq-asym": Case({"quant": "awq-asym"}, dtype="float16"),
    "w8a8": Case({"quant": "w8a8"}, dtype="bfloat16"),
    "fp8": Case({"quant": "fp8"}, dtype="bfloat16"),
}
# What it does not open, or has no kernels for where there is no GPU.
REFUSED: Mapping[str, str] = {
    "gptq-asym": "float16",
    "w8a16": "bfloat16",
    "nvfp4a16": "bfloat16",
    "mxfp4a16": "bfloat16",
}


@pytest.mark.foreign
@pytest.mark.timeout(3600)
def test_vllm_serves_what_streamconv_decodes(tmp_path: Path) -> None:
    base = small_llama(tmp_path / "base")
    outputs = written(CASES, base, tmp_path)
    whole = reference(base)
    models: dict[str, dict[str, Any]] = {}
    versions: Mapping[str, str] = {}
    for name, model in outputs.items():  # a process for each: vLLM keeps what it took
        dense, dtype = tmp_path / f"{name} decoded", CASES[name].dtype
        decoded(model, dense, CASES[name].decoded_in)
        answer = read_by("vllm", {name: model}, tmp_path / "answers", dtype=dtype)[name]
        models[name] = {
            "dtype": dtype,
            "divergence": divergence(reference(dense), answer.logits),
            "divergence_from_16_bit": divergence(whole, answer.logits),
        }
        versions = answer.versions
    others = written({name: Case({"quant": name}) for name in REFUSED}, base, tmp_path)
    refused = {name: refusal("vllm", model, dtype=REFUSED[name]) for name, model in others.items()}
    keep("vllm", versions, models, refused)
    for name, found in models.items():
        assert found["divergence"] < (EIGHT_BIT_SUMS if name in ACTIVATIONS_OF_8_BITS else LIMIT), name
