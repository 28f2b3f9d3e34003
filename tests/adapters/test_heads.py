"""Heads of other tasks: a merge opens as the class that was trained, and gives PEFT's logits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import (
    BertConfig,
    Dinov2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    ResNetConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
)
from transformers.models.auto import modeling_auto

import streamconv
from streamconv.adapters.base import Parameter
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.heads import find_head
from streamconv.adapters.source import BaseParameters, Source
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32
from streamconv.errors import AdapterError, OptionError, UnsupportedError
from streamconv.storage.base import SourceFile
from tests.tiny import TOKENS, edit_json, edit_tensors, read_tensors, save_adapter, save_base

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
WORDS: Mapping[str, Any] = {**SIZES, "vocab_size": 40}
PIXELS = MappingProxyType({"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)})


@dataclass(frozen=True, slots=True)
class Case:
    """Classes of base and training, config, LoRA, labels (None: the config's), modules of the base that must go."""

    base: str
    trained: str
    config: PretrainedConfig
    lora: Mapping[str, Any]
    labels: int | None
    gone: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"input_ids": TOKENS})


LLAMA = LlamaConfig(**WORDS, pad_token_id=0)
QV: Mapping[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
QUERY: Mapping[str, Any] = {"target_modules": ["query"]}
CASES = {
    "reward": Case(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        LLAMA,
        {**QV, "task_type": "SEQ_CLS"},
        1,
        ("lm_head",),
    ),
    "three classes": Case(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        LLAMA,
        {**QV, "task_type": "SEQ_CLS"},
        3,
        ("lm_head",),
    ),
    "tokens": Case(
        "Qwen2ForCausalLM",
        "Qwen2ForTokenClassification",
        Qwen2Config(**WORDS, num_key_value_heads=2),
        {**QV, "task_type": "TOKEN_CLS"},
        5,
        ("lm_head",),
    ),
    "tied, with a LoRA on the embedding": Case(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        Qwen2Config(**WORDS, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0),
        {"target_modules": ["q_proj", "embed_tokens"], "task_type": "SEQ_CLS"},
        2,
    ),
    "BERT": Case(
        "BertForPreTraining",
        "BertForSequenceClassification",
        BertConfig(**WORDS),
        {**QUERY, "task_type": "SEQ_CLS"},
        3,
        ("cls",),
    ),
    "BERT's answers": Case(
        "BertForMaskedLM",
        "BertForQuestionAnswering",
        BertConfig(**WORDS),
        {**QUERY, "task_type": "QUESTION_ANS"},
        None,
        ("cls",),
    ),
    "a head of two layers": Case(
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        RobertaConfig(**WORDS),
        {**QUERY, "task_type": "SEQ_CLS"},
        3,
        ("lm_head",),
    ),
    "images, other labels than the base's": Case(
        "ViTForImageClassification",
        "ViTForImageClassification",
        ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=7),
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        4,
        inputs=PIXELS,
    ),
    "BERT without head and prefix": Case(
        "BertModel",
        "BertForSequenceClassification",
        BertConfig(**WORDS),
        {**QUERY, "modules_to_save": ["classifier", "pooler", "LayerNorm"]},
        3,
    ),
    "all biases beside a head": Case(
        "BertModel",
        "BertForSequenceClassification",
        BertConfig(**WORDS),
        {**QUERY, "use_dora": True, "bias": "all", "task_type": "SEQ_CLS"},
        3,
    ),
    "a reward on a base without head, its embedding saved": Case(
        "LlamaModel",
        "LlamaForSequenceClassification",
        LLAMA,
        {**QV, "modules_to_save": ["embed_tokens"], "task_type": "SEQ_CLS"},
        1,
    ),
    "images, without head and prefix": Case(
        "Dinov2Model",
        "Dinov2ForImageClassification",
        Dinov2Config(**SIZES, image_size=8, patch_size=4),
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        4,
        inputs=PIXELS,
    ),
    "batch norms": Case(
        "ResNetModel",
        "ResNetForImageClassification",
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier"]},
        4,
        inputs=PIXELS,
    ),
    "a classifier with other labels": Case(
        "LlamaForSequenceClassification",
        "LlamaForSequenceClassification",
        LlamaConfig(**WORDS, pad_token_id=0, num_labels=5),
        {**QV, "task_type": "SEQ_CLS"},
        3,
    ),
}


@dataclass(frozen=True, slots=True)
class Labelled:
    """An auto class that makes a model of so many labels, whatever the config says."""

    name: str
    labels: int | None

    def from_pretrained(self, folder: Path, **options: Any) -> Any:
        """The model, its new head drawn from a seed."""
        torch.manual_seed(3)
        labels = {} if self.labels is None else {"num_labels": self.labels}
        cls = getattr(transformers, self.name)
        return cls.from_pretrained(folder, ignore_mismatched_sizes=True, **labels, **options)


@dataclass(frozen=True, slots=True)
class Named:
    """An auto class that makes a model of the class `name`."""

    name: str

    def from_config(self, config: PretrainedConfig) -> Any:
        return getattr(transformers, self.name)(config)


@dataclass(frozen=True, slots=True)
class Given:
    """An auto class that has its model already."""

    model: Any

    def from_pretrained(self, folder: Path, **options: Any) -> Any:
        return self.model


def saved(folder: Path, case: Case) -> tuple[Path, Any]:
    base = save_base(folder / "base", case.config, auto_class=Named(case.base))
    model = getattr(transformers, case.base).from_pretrained(base)
    model.save_pretrained(base, save_original_format=False)  # names as in training
    labelled = Labelled(case.trained, case.labels)
    return base, save_adapter(folder / "adapter", base, LoraConfig(r=4, **case.lora), auto_class=labelled)


def outputs(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        found = model(**case.inputs)
    return torch.cat([value.flatten() for name, value in found.items() if "logits" in name])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_merge_is_the_trained_class(tmp_path: Path, case: Case) -> None:
    base, adapter = saved(tmp_path, case)
    out = tmp_path / "out"
    streamconv.merge(base, adapter.path, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [case.trained]
    model, info = getattr(transformers, case.trained).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_labels == (case.labels or 2)
    difference = outputs(model.eval(), case) - outputs(adapter.live, case)
    assert difference.abs().max() < 1e-5
    names = read_tensors(out / "model.safetensors").keys()
    assert not any(name.startswith(gone) for name in names for gone in case.gone)
    card = (out / "README.md").read_text()
    (note,) = re.findall("note . (the adapter holds the head .*) .\n", card)
    assert f"the output is a {case.trained}" in note
    assert all(gone in note for gone in case.gone)
    assert f"{case.trained}.from_pretrained" in card
    streamconv.verify(out)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_merge_keeps_the_head_in_16_bit(tmp_path: Path, quant: str) -> None:
    base, adapter = saved(tmp_path, CASES["three classes"])
    out = tmp_path / "out"
    streamconv.merge(base, adapter.path, out, quant=quant, min_kept=0)
    tensors = read_tensors(out / "model.safetensors")
    head = read_tensors(adapter.path / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(tensors["score.weight"], head)
    assert "lm_head.weight" not in tensors
    config = json.loads((out / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert "score" in skipped
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype in (torch.uint8, torch.int8)


def test_names_of_labels_stay_where_they_are_as_many(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, CASES["three classes"])
    names = {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    edit_json(base / "config.json", **names, num_labels=3)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in names} == names


def test_a_base_in_16_bit_gets_a_head_in_16_bit(tmp_path: Path) -> None:
    case = CASES["reward"]
    base, adapter = saved(tmp_path, case)
    save_base(base, case.config, dtype=torch.bfloat16)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    assert read_tensors(tmp_path / "out" / "model.safetensors")["score.weight"].dtype == torch.bfloat16


def test_a_part_of_the_class_that_neither_file_holds(tmp_path: Path) -> None:
    case = CASES["BERT"]
    base, adapter = saved(tmp_path, case)
    save_base(base, case.config, auto_class=Named("BertForMaskedLM"))
    with pytest.raises(
        AdapterError, match=r"bert\.pooler before its head, and neither .* 'pooler' in modules_to_save"
    ):
        streamconv.merge(base, adapter.path, tmp_path / "out")


def test_a_class_that_nothing_tells(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, CASES["reward"])
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    with pytest.raises(
        UnsupportedError, match=r"head for SequenceClassification, .* tell the class that has it"
    ):
        streamconv.merge(base, adapter.path, tmp_path / "out")
    edit_json(base / "config.json", auto_map={"AutoModelForSequenceClassification": "modeling_x.XForRewards"})
    streamconv.merge(base, adapter.path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["XForRewards"]


def test_another_module_that_the_base_lacks_is_no_head(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, CASES["reward"])
    edit_json(adapter.path / "adapter_config.json", task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"score\.weight, which the base model does not have"):
        streamconv.merge(base, adapter.path, tmp_path / "out")


def test_a_head_that_is_lost(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, CASES["reward"])
    edit_tensors(adapter.path / "adapter_model.safetensors", drop=["base_model.model.score.weight"])
    with pytest.raises(
        AdapterError, match="modules_to_save lists 'classifier', but the adapter holds no tensor"
    ):
        streamconv.merge(base, adapter.path, tmp_path / "out")


def test_a_class_that_does_not_open_the_base(tmp_path: Path) -> None:
    """transformers' LlamaForQuestionAnswering has `transformer.`, so it opens none of LlamaForCausalLM's weights."""
    case = Case(
        "LlamaForCausalLM", "LlamaForQuestionAnswering", LLAMA, {**QV, "task_type": "QUESTION_ANS"}, None
    )
    base, adapter = saved(tmp_path, case)
    with pytest.raises(
        UnsupportedError, match=r"has its weights under 'transformer\.', and the base under 'model\.'"
    ):
        streamconv.merge(base, adapter.path, tmp_path / "out")


def test_labels_that_are_tokens_of_speech(tmp_path: Path) -> None:
    """CTC on a base without head: its rows are the vocabulary, which config.json counts."""
    sound = Wav2Vec2Config(
        **SIZES, conv_dim=[8], conv_kernel=[3], conv_stride=[2], num_feat_extract_layers=1, vocab_size=21,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    )  # fmt: skip
    base = save_base(tmp_path / "base", sound, auto_class=Named("Wav2Vec2Model"))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = transformers.Wav2Vec2ForCTC.from_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", base, config, auto_class=Given(model))
    edit_json(base / "config.json", vocab_size=32)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    merged = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out").eval()
    waves = {"input_values": torch.linspace(-1, 1, 80)[None]}
    with torch.no_grad():
        assert (merged(**waves).logits - adapter.live(**waves).logits).abs().max() < 1e-5
    assert merged.config.vocab_size == 21


def test_names_that_peft_lists_beside_a_head_of_the_base_s_own(tmp_path: Path) -> None:
    """PEFT lists `classifier` and `score` for any such task; T5's head is called otherwise and stays as it is."""
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=40, num_labels=3, decoder_start_token_id=0
    )  # fmt: skip
    case = Case(
        "T5ForSequenceClassification",
        "T5ForSequenceClassification",
        config,
        {"target_modules": ["q"], "task_type": "SEQ_CLS"},
        3,
        inputs={"input_ids": torch.tensor([[5, 6, 7, 1]])},
    )
    base, adapter = saved(tmp_path, case)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    model = transformers.T5ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert (outputs(model, case) - outputs(adapter.live, case)).abs().max() < 1e-5


def test_text_is_for_language_models(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, CASES["reward"])
    (tmp_path / "text.txt").write_text("words " * 200)
    with pytest.raises(OptionError, match=r"--calibration runs .* makes a LlamaForSequenceClassification"):
        streamconv.merge(base, adapter.path, tmp_path / "out", quant="nf4", calibration=tmp_path / "text.txt")


# -- classes by name -------------------------------------------------------------------------------------------------

MAPPINGS = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
LANGUAGE = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
# Of families with two classes for it, or whose whole and part share a class.
IRREGULAR = {"funnel", "cohere_compass_text", "flaubert", "xlm", "xlnet", "perceiver"}


@pytest.mark.parametrize("task", MAPPINGS)
def test_the_class_is_that_of_transformers(task: str) -> None:
    head = SourceFile("adapter_model.safetensors", "", 10**6, "")
    tensors = {"score.weight": StoredTensor("score.weight", F32, (3, 8), head, 0)}
    fields = {"task_type": task, "modules_to_save": ["score"]}
    source = Source("adapter", AdapterConfig("adapter", fields, b""), tensors)
    parts = ("pooler", "pre_classifier", "dense", "sequence_summary", "logits_proj")
    parameters = {f"{part}.weight": Parameter(f"{part}.weight", (8, 8)) for part in parts}
    checked = 0
    for model_type, name in MAPPINGS[task].items():
        names = [name] if isinstance(name, str) else list(name)
        for mapping in LANGUAGE if model_type not in IRREGULAR else ():
            base_class = mapping.get(model_type, ())
            for architecture in [base_class] if isinstance(base_class, str) else base_class:
                config = {"model_type": model_type, "architectures": [architecture]}
                found = find_head(source, BaseParameters(parameters, config, None))
                assert found is not None
                assert found.architecture in names
                checked += 1
    assert checked > 60
