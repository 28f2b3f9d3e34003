"""Adapters made and saved by PEFT, merged from their files alone, against the logits of PEFT's live model.

Not against PEFT's own merge, which writes the changes of tied embeddings into one tensor. Both sides compute
in float32 and differ by the order of additions only: 1e-4 of the largest logit is some hundred roundings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.merging import merged_model, read
from tests.tiny import Adapter, gpt2_config, llama_config, logits, save_adapter, save_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_base(folder / "llama", llama_config(), max_shard_size="30KB"),
        "tied": save_base(folder / "tied", llama_config(tied=True)),
        "gpt2": save_base(folder / "gpt2", gpt2_config()),
    }


def assert_same_logits(base: Path, adapter: Adapter) -> None:
    expected = adapter.logits()
    with adapter.live.disable_adapter():
        unadapted = adapter.logits()
    scale = expected.abs().max()
    assert (expected - unadapted).abs().max() > 0.01 * scale, "the adapter must matter"
    found = logits(merged_model(base, read(base, adapter.path)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(scale))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION + MLP}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear but some": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    ),
    "regex": ("llama", {"target_modules": r".*\.1\.(self_attn|mlp)\.(q|up)_proj"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "rslora": ("llama", {"target_modules": ATTENTION + MLP, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION + MLP,
            "rank_pattern": {
                "^model.layers.0.self_attn.q_proj": 3,
                "layers.1.mlp.up_proj": 8,
                ".*down_proj": 6,
            },
            "alpha_pattern": {"q_proj": 7, r".*\.1\.mlp\.(up|gate)_proj": 24, "up_proj": 2},
        },
    ),
    "patterns with rslora": (
        "llama",
        {
            "target_modules": MLP,
            "use_rslora": True,
            "rank_pattern": {"up_proj": 9},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "saved head": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "saved embedding": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "saved both": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved container": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["layers.0.mlp", "norm"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "dora": ("llama", {"target_modules": ATTENTION + MLP, "use_dora": True}),
    "dora with rslora": ("llama", {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True}),
    "gaussian start": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "tied, body only": ("tied", {"target_modules": ATTENTION}),
    "tied, head adapted": ("tied", {"target_modules": ["lm_head"]}),
    "tied, head adapted by dora": ("tied", {"target_modules": ["lm_head", "q_proj"], "use_dora": True}),
    "tied, head saved": ("tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "tied, embedding saved": ("tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "tied, head adapted, embedding saved": (
        "tied",
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied, both saved": (
        "tied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied, both saved as one": (
        "tied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "conv1d": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "conv1d with wrong flag": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": False}),
    "conv1d and head": ("gpt2", {"target_modules": [*CONV1D, "lm_head"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True, "use_dora": True}),
}
UNTIED = {
    "tied, head adapted",
    "tied, head adapted by dora",
    "tied, head saved",
    "tied, embedding saved",
    "tied, head adapted, embedding saved",
    "tied, both saved",
    "conv1d and head",
}


@pytest.mark.parametrize("case", CASES)
def test_merged_model_is_the_live_model(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, fields = CASES[case]
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **fields)
    adapter = save_adapter(tmp_path, bases[base], config)
    assert read(bases[base], tmp_path).untie is (case in UNTIED)
    assert_same_logits(bases[base], adapter)
