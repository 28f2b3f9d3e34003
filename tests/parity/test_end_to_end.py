"""Merges through the public API, from files to files, opened with stock transformers, against PEFT's live model.

All in float32: the two sides differ by the order of additions only, and 1e-4 of the greatest logit is some
hundred roundings. The reference is the live model, base and adapter side by side, because PEFT's own merge is
wrong for most adapters that touch tied embeddings; that it is, is asserted here too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Qwen2Config

import streamconv
from tests.parity.opening import logits_differ_by, merged_by_peft, open_model, relative_difference, tensors
from tests.tiny import (
    Adapter,
    edit_json,
    edit_tensors,
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


# -- what an adapter may also be like --------------------------------------------------------------------------


def store_in_bf16(adapter: Adapter) -> None:
    """Round every trained value of the live model to bfloat16, and the file with it."""
    file = adapter.path / "adapter_model.safetensors"
    with torch.no_grad():
        for parameter in adapter.live.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    trained = {name: t for name, t in read_tensors(file).items() if ".base_layer." not in name}
    edit_tensors(file, put={name: tensor.bfloat16() for name, tensor in trained.items()})


@pytest.mark.parametrize("base", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("form", ["plain", "dora", "both saved", "head adapted, embedding saved"])
def test_adapters_may_be_stored_in_bfloat16(
    base: str, form: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases[base], lora_config(base, form))
    store_in_bf16(adapter)
    out = merged(bases[base], adapter.path, tmp_path / "out")
    assert logits_differ_by(open_model(out), adapter.logits()) < TOLERANCE
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32}, "the base's own type stays"


def test_saved_modules_take_the_type_of_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, lora_config("llama", "both saved"))
    file = adapter.path / "adapter_model.safetensors"
    edit_tensors(file, put={name: tensor.float() * 1.001 for name, tensor in read_tensors(file).items()})
    saved = read_tensors(file)
    found = tensors(merged(base, adapter.path, tmp_path / "out"))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name], saved[f"base_model.model.{name}"].bfloat16())


def test_a_saved_classifier_is_the_live_classifier(tmp_path: Path) -> None:
    config = llama_config()
    config.num_labels, config.pad_token_id = 3, 0
    classifier = AutoModelForSequenceClassification
    base = save_base(tmp_path / "base", config, auto_class=classifier)
    lora = LoraConfig(r=4, target_modules=LINEAR, task_type="SEQ_CLS")
    adapter = save_adapter(tmp_path / "adapter", base, lora, auto_class=classifier)
    assert "base_model.model.score.weight" in read_tensors(adapter.path / "adapter_model.safetensors")
    model = open_model(merged(base, adapter.path, tmp_path / "out"), classifier)
    assert logits_differ_by(model, adapter.logits()) < TOLERANCE


@pytest.mark.parametrize("form", ["plain", "both saved as one", "head", "head saved", "embedding saved"])
@pytest.mark.parametrize("stored_head", ["equal", "different"])
def test_a_tied_head_may_be_stored_all_the_same(form: str, stored_head: str, tmp_path: Path) -> None:
    """transformers 5 ties the two if they are equal, and keeps them apart if not, whatever the config says."""
    base = save_base(tmp_path / "base", llama_config(tied=True))
    embedding = tensors(base)["model.embed_tokens.weight"]
    head = embedding.clone() if stored_head == "equal" else embedding.flip(0)
    edit_tensors(base / "model.safetensors", put={"lm_head.weight": head})
    adapter = save_adapter(tmp_path / "adapter", base, lora_config("llama tied", form))
    expected = adapter.logits()
    assert_adapter_matters(adapter, expected)
    model = open_model(merged(base, adapter.path, tmp_path / "out"))
    assert logits_differ_by(model, expected) < TOLERANCE


# -- how a base may lie on the disk ------------------------------------------------------------------------------


def as_one_file(base: Path, folder: Path) -> Path:
    return save_base(folder, llama_config())


def with_strange_names(base: Path, folder: Path) -> Path:
    """Shards under other names, in another order than their names sort, one tensor of theirs alone in the last."""
    shutil.copytree(base, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    strange = {
        name: f"part {len(names) - number}{'.' * number} (tensors).safetensors"
        for number, name in enumerate(names)
    }
    for old, new in strange.items():
        (folder / old).rename(folder / new)
    edit_json(
        folder / "model.safetensors.index.json",
        weight_map={name: strange[shard] for name, shard in index["weight_map"].items()},
    )
    return folder


def as_hub_snapshot(base: Path, folder: Path) -> Path:
    """What snapshot_download leaves: files are links into a folder of blobs, which are named by hash."""
    model = folder / "models--someone--tiny"
    snapshot = model / "snapshots" / ("0123456789abcdef" * 3)[:40]
    for place in (model / "blobs", model / "refs", snapshot):
        place.mkdir(parents=True)
    (model / "refs" / "main").write_text(snapshot.name)
    for file in base.iterdir():
        blob = model / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.parametrize("layout", [as_one_file, with_strange_names, as_hub_snapshot])
def test_layouts_of_the_base_make_no_difference(
    layout: Callable[[Path, Path], Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], lora_config("llama", "body and head"))
    base = layout(bases["llama"], tmp_path / "base")
    out = merged(base, adapter.path, tmp_path / "out")
    usual = merged(bases["llama"], adapter.path, tmp_path / "usual")
    found, expected = tensors(out), tensors(usual)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert logits_differ_by(open_model(out), adapter.logits()) < TOLERANCE
    assert not any(file.is_symlink() for file in out.iterdir())
    assert all(
        re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name) for path in out.glob("*.safetensors")
    )


def test_adapters_may_be_hub_snapshots(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], lora_config("llama", "plain"))
    out = merged(bases["llama"], as_hub_snapshot(adapter.path, tmp_path / "cache"), tmp_path / "out")
    assert logits_differ_by(open_model(out), adapter.logits()) < TOLERANCE
