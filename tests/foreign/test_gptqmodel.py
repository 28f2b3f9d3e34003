"""transformers with GPTQModel opens GPTQ and AWQ output, and its layers multiply by what ours dequantizes to.

`tools/foreign` runs this: GPTQModel needs an environment of its own, whose Python STREAMCONV_FOREIGN names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import streamconv
from tests.tiny import save_base

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "docs" / "results" / "foreign-gptqmodel.json"
CASES: Mapping[str, Mapping[str, Any]] = {
    "gptq": {"quant": "gptq"},
    "gptq, group 32": {"quant": "gptq", "group_size": 32},
    "gptq, down_proj in 16 bit": {"quant": "gptq", "ignore": ("mlp.down_proj",)},
    "gptq-v2": {"quant": "gptq-v2"},
    "gptq-v2, group 32": {"quant": "gptq-v2", "group_size": 32},
    "gptq-v2, down_proj in 16 bit": {"quant": "gptq-v2", "ignore": ("mlp.down_proj",)},
    "awq": {"quant": "awq"},
    "awq, group 64": {"quant": "awq", "group_size": 64},
    "awq, down_proj in 16 bit": {"quant": "awq", "ignore": ("mlp.down_proj",)},
}


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_gptqmodel_multiplies_by_what_the_formula_gives(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    for name, options in CASES.items():
        streamconv.convert(base, tmp_path / name, **options)
    command = [os.environ["STREAMCONV_FOREIGN"], str(Path(__file__).with_name("read_packed.py"))]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in CASES)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for name, readings in found["models"].items():
        in_float16, in_bfloat16 = readings
        assert in_float16["greatest_difference"] == 0, name
        assert in_bfloat16["greatest_difference"] < 2**-8, name  # products in bfloat16
        left = {"lm_head"} | ({"down_proj"} if "16 bit" in name else set())
        for reading in readings:
            assert set(reading["linear_in_16_bit"]) == left, name
            assert reading["logits_are_finite"], name
    assert set(found["models"]) == set(CASES)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
