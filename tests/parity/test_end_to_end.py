"""Merges through the public API, from files to files, opened with stock transformers, against PEFT's live model.

All in float32: the two sides differ by the order of additions only, and 1e-4 of the greatest logit is some
hundred roundings. The reference is the live model, base and adapter side by side, because PEFT's own merge is
wrong for most adapters that touch tied embeddings; that it is, is asserted here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from torch import Tensor
from transformers import Qwen2Config

import streamconv
from tests.parity.opening import logits_differ_by, merged_by_peft, open_model, relative_difference
from tests.tiny import (
    Adapter,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

TOLERANCE = 1e-4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]

# What a form does to the model is said once, in these words; each base has its own names for them.
WORDS: Mapping[str, Mapping[str, list[str]]] = {
    "llama": {"BODY": LINEAR, "HEAD": ["lm_head"], "EMBEDDING": ["embed_tokens"]},
    "gpt2": {"BODY": CONV1D, "HEAD": ["lm_head"], "EMBEDDING": ["wte"]},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["BODY"]},
    "rslora": {"target_modules": ["BODY"], "use_rslora": True},
    "patterns": {
        "target_modules": ["BODY"],
        "rank_pattern": {r"(model.layers|transformer.h).0.*(q_proj|c_attn)": 3, "(down_proj|c_fc)": 9},
        "alpha_pattern": {"(q_proj|c_fc)": 7, r".*\.1\.(mlp|attn)\.(up_proj|c_proj)": 24},
    },
    "dora": {"target_modules": ["BODY"], "use_dora": True},
    "dora with rslora": {"target_modules": ["BODY"], "use_dora": True, "use_rslora": True},
    "head": {"target_modules": ["HEAD"]},
    "body and head": {"target_modules": ["BODY", "HEAD"]},
    "head by dora": {"target_modules": ["HEAD"], "use_dora": True},
    "head saved": {"target_modules": ["BODY"], "modules_to_save": ["HEAD"]},
    "embedding saved": {"target_modules": ["BODY"], "modules_to_save": ["EMBEDDING"]},
    "both saved": {"target_modules": ["BODY"], "modules_to_save": ["EMBEDDING", "HEAD"]},
    "head adapted, embedding saved": {"target_modules": ["HEAD"], "modules_to_save": ["EMBEDDING"]},
    "both saved as one": {
        "target_modules": ["BODY"],
        "modules_to_save": ["HEAD"],  # PEFT knows a tied layer by the names lm_head and embed_tokens only
        "ensure_weight_tying": True,
    },
}
TIED = ("llama tied", "gpt2")
UNTIES = {
    "head",
    "body and head",
    "head by dora",
    "head saved",
    "embedding saved",
    "both saved",
    "head adapted, embedding saved",
}
# PEFT 0.21.2 writes the update of the head into the tensor that is the embedding too.
PEFT_MERGES_WRONGLY = {"head", "body and head", "head by dora"}
CASES = [
    (base, form)
    for base in ("llama", "llama tied", "gpt2", "qwen2")
    for form in FORMS
    if base in TIED or form != "both saved as one"  # PEFT warns and does nothing
]


def qwen2_config() -> Qwen2Config:
    """Untied, with biases on q, k and v."""
    return Qwen2Config(**llama_config().to_dict() | {"model_type": "qwen2", "architectures": None})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    configs = {
        "llama": llama_config(),
        "llama tied": llama_config(tied=True),
        "gpt2": gpt2_config(),
        "qwen2": qwen2_config(),
    }
    saved = {
        name: save_base(folder / name, config, max_shard_size="30KB") for name, config in configs.items()
    }
    assert all(len(list(path.glob("*.safetensors"))) > 3 for path in saved.values())
    assert "model.layers.0.self_attn.q_proj.bias" in tensors(saved["qwen2"])
    return saved


def lora_config(base: str, form: str, **fields: Any) -> LoraConfig:
    words = WORDS["gpt2" if base == "gpt2" else "llama"]
    named = FORMS[form] | {
        key: [name for word in FORMS[form][key] for name in words[word]]
        for key in ("target_modules", "modules_to_save")
        if key in FORMS[form]
    }
    is_conv1d = base == "gpt2" and "BODY" in FORMS[form]["target_modules"]
    defaults = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_conv1d}
    return LoraConfig(**defaults | named | fields)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in read_tensors(file).items()}


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    streamconv.merge(str(base), str(adapter), str(out), **options)
    return out


def assert_adapter_matters(adapter: Adapter, expected: Tensor) -> None:
    with adapter.live.disable_adapter():
        assert relative_difference(adapter.logits(), expected) > 0.01


@pytest.mark.parametrize(("base", "form"), CASES)
def test_merged_files_are_the_live_model(
    base: str, form: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases[base], lora_config(base, form))
    expected = adapter.logits()
    assert_adapter_matters(adapter, expected)
    out = merged(bases[base], adapter.path, tmp_path / "out")
    model = open_model(out)
    assert logits_differ_by(model, expected) < TOLERANCE
    unties = form in UNTIES and base in TIED
    assert model.config.tie_word_embeddings is (base in TIED and not unties)
    assert ("lm_head.weight" in tensors(out)) is (base not in TIED or unties)
    if unties:
        is_wrong = logits_differ_by(merged_by_peft(adapter), expected) > 0.01
        assert is_wrong is (form in PEFT_MERGES_WRONGLY)
