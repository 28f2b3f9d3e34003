"""Bases with the names that files have, adapters with those of transformers' classes: merged as PEFT merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    ViTConfig,
)

import streamconv
from tests.parity.opening import merged_by_peft, open_model, tensors
from tests.tiny import read_tensors, save_adapter, save_base

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER = SIZES | {"image_size": 28, "patch_size": 14}
LLAVA = LlavaConfig(
    text_config=LlamaConfig(**SIZES, vocab_size=40), vision_config=CLIPVisionConfig(**TOWER), image_token_index=5
)  # fmt: skip
VIT = ViTConfig(**TOWER, num_labels=3)


@pytest.mark.parametrize(
    ("config", "auto_class", "lora", "said"),
    [
        (LLAVA, AutoModelForImageTextToText, {"target_modules": "all-linear"}, "language_model"),
        (
            VIT,
            AutoModelForImageClassification,
            {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
            "vit.encoder.layer",
        ),
    ],
    ids=["llava", "vit"],
)
def test_merged_as_peft_merges(
    config: PreTrainedConfig, auto_class: Any, lora: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", config, auto_class=auto_class)
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, **lora), auto_class=auto_class)
    keys = {key.partition(".lora_")[0] for key in read_tensors(adapter.path / "adapter_model.safetensors")}
    assert not {f"{key.removeprefix('base_model.model.')}.weight" for key in keys} <= set(tensors(base))
    report = streamconv.merge(base, adapter.path, tmp_path / "out")
    assert report.renamed is not None
    assert said in report.renamed
    assert set(tensors(tmp_path / "out")) == set(tensors(base)), "the base's own names stay"
    expected = merged_by_peft(adapter).state_dict()
    found = open_model(tmp_path / "out", auto_class).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
