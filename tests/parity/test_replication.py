"""Adapters trained on repeated layers: files to files, opened with stock loaders, against PEFT's live model.

In float32 the two sides differ by the order of additions only. PEFT's own merge adds the updates of all copies to the
one weight they share, which is another model; that it is, is asserted.
"""

# ruff: noqa: E501  a table reads best with one case a line

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

import streamconv
from streamconv.planning.depth import KINDS
from tests.parity.opening import (
    decoded_by_us,
    dequantized,
    linear4bit,
    merged_by_peft,
    open_model,
    relative_difference,
    tensors,
)
from tests.tiny import TOKENS, VOCABULARY, Adapter, save_adapter, save_base

TOLERANCE = 1e-4
OVERLAPPING = [[0, 2], [1, 3]]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a family, its ranges, and fields of its config and of LoraConfig."""

    family: str
    name: str
    ranges: Sequence[Sequence[int]]
    lora: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    auto_class: Any = AutoModelForCausalLM

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"

    @property
    def sources(self) -> list[int]:
        return [layer for start, end in self.ranges for layer in range(start, end)]

    def base_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.family, **SIZES | dict(self.config))


def lora(*targets: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), **fields}


QV = ("q_proj", "v_proj")
CLASSIFIER: dict[str, Any] = {"auto_class": AutoModelForSequenceClassification, "config": {"num_labels": 3}}
CASES = [
    Case("llama", "overlapping", OVERLAPPING, lora(*QV, "down_proj")),
    Case("llama", "next to each other", [[0, 1], [1, 3]], lora(*QV)),
    Case("llama", "cut out and turned", [[2, 3], [0, 1]], lora(*QV)),
    Case("llama", "three times", [[1, 2], [1, 2], [1, 2]], lora(*QV)),
    Case("llama", "dora", OVERLAPPING, lora(*QV, "down_proj", use_dora=True)),
    Case("llama", "ranks by new number", OVERLAPPING, lora("q_proj", rank_pattern={"layers.3.self_attn.q_proj": 2}, alpha_pattern={"layers.2.self_attn.q_proj": 9})),
    Case("llama", "some layers only", OVERLAPPING, lora("q_proj", layers_to_transform=[0, 2])),
    Case("llama", "named layers only", OVERLAPPING, lora("layers.3.self_attn.q_proj", "layers.1.self_attn.q_proj")),
    Case("llama", "one layer excluded", OVERLAPPING, lora("q_proj", exclude_modules=["layers.2.self_attn.q_proj"])),
    Case("llama", "all linear", OVERLAPPING, {"target_modules": "all-linear"}),
    Case("llama", "head, norms saved", OVERLAPPING, lora("q_proj", modules_to_save=["lm_head", "input_layernorm"])),
    Case("llama", "tied, embedding", OVERLAPPING, lora("q_proj", "embed_tokens"), {"tie_word_embeddings": True}),
    Case("llama", "trained rows", OVERLAPPING, lora("q_proj", trainable_token_indices=[5, 3])),
    Case("llama", "classifier", OVERLAPPING, lora(*QV, task_type="SEQ_CLS"), **CLASSIFIER),
    Case("llama", "headless", OVERLAPPING, lora(*QV, task_type="FEATURE_EXTRACTION"), auto_class=AutoModel),
    Case("qwen2", "all biases", OVERLAPPING, lora("q_proj", bias="all")),
    Case("qwen2", "bias of lora_B", OVERLAPPING, lora(*QV, lora_bias=True)),
    Case("qwen2", "windows", OVERLAPPING, lora(*QV), {"use_sliding_window": True, "sliding_window": 2, "layer_types": TYPES}),
    Case("gemma2", "layers of two kinds", [[0, 1], [0, 3]], lora(*QV), {"sliding_window": 2, "head_dim": 8}),
    Case("smollm3", "rotary in some layers", [[1, 3], [0, 2]], lora(*QV), {"no_rope_layers": [1, 0, 1]}),
    Case("mixtral", "experts", OVERLAPPING, lora("q_proj", target_parameters=EXPERTS), {"num_local_experts": 3}),
    Case("bert", "classifier", OVERLAPPING, lora("query", "value", "output.dense", task_type="SEQ_CLS"), **CLASSIFIER),
    Case("bert", "headless", OVERLAPPING, lora("query", "value", "output.dense", task_type="FEATURE_EXTRACTION"), auto_class=AutoModel),
    Case("falcon", "headless", OVERLAPPING, lora("query_key_value", task_type="FEATURE_EXTRACTION"), auto_class=AutoModel),
]  # fmt: skip

# Families of KINDS that no row above has; `kinds` makes layers of two kinds where there can be some.
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 2, "layer_types": TYPES}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "arcee": {},
    "cohere": {},
    "cohere2": WINDOW,
    "ernie4_5": HEADS,
    "exaone4": WINDOW,
    "gemma": HEADS,
    "gemma3_text": HEADS | WINDOW,
    "glm": HEADS,
    "glm4": HEADS,
    "gpt_oss": HEADS | WINDOW | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "granite": {},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "helium": HEADS,
    "mistral": {"sliding_window": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 3},
    "qwen3": HEADS,
    "qwen3_moe": HEADS | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "seed_oss": HEADS,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": HEADS | WINDOW,
}


def outputs(model: torch.nn.Module) -> Tensor:
    """Logits; of a headless model, its last hidden state."""
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS)[0]
    return found


def without_adapter(adapter: Adapter) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers", category=UserWarning)
        with adapter.live.disable_adapter():
            return outputs(adapter.live)


def trained(case: Case, folder: Path, base: Path) -> Adapter:
    """The adapter of `case`, its live model in a state that works.

    PEFT leaves a config's lists of layers as they were, which transformers 5 then reads beyond their end.
    """
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "layer_replication": case.ranges}
    adapter = save_adapter(folder, base, LoraConfig(**fields | dict(case.lora)), auto_class=case.auto_class)
    config = adapter.live.config
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, [getattr(config, name)[source] for source in case.sources])
    return adapter


def of_family(family: str, config: Mapping[str, Any]) -> Case:
    targets = ("qkv_proj", "o_proj") if family == "phi3" else QV
    return Case(family, "every family", [[0, 1], [0, 3]], lora(*targets), config)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(of_family(*each), marks=pytest.mark.sweep) for each in FAMILIES.items())],
    ids=str,
)
def test_merged_files_are_the_live_model(case: Case, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", case.base_config(), auto_class=case.auto_class)
    adapter = trained(case, tmp_path / "adapter", base)
    expected = outputs(adapter.live)
    assert relative_difference(without_adapter(adapter), expected) > 1e-3
    streamconv.merge(base, adapter.path, tmp_path / "out")
    merged = open_model(tmp_path / "out", case.auto_class)
    assert relative_difference(outputs(merged), expected) < TOLERANCE
    assert merged.config.num_hidden_layers == len(case.sources)
    if len(set(case.sources)) < len(case.sources):
        assert relative_difference(outputs(merged_by_peft(adapter)), expected) > 1e-3


def test_names_of_another_class_are_matched_with_the_layers_there_are(tmp_path: Path) -> None:
    """An adapter of the headless class, whose layers are not below `model.`."""
    case = Case(
        "llama", "headless", OVERLAPPING, lora(*QV, task_type="FEATURE_EXTRACTION"), auto_class=AutoModel
    )
    base = save_base(tmp_path / "base", case.base_config())
    adapter = trained(case, tmp_path / "adapter", base)
    report = streamconv.merge(base, adapter.path, tmp_path / "out")
    assert report.renamed is not None
    merged = open_model(tmp_path / "out")
    assert relative_difference(outputs(merged.model), outputs(adapter.live)) < TOLERANCE


def test_every_family_is_tried() -> None:
    assert {case.family for case in CASES} | FAMILIES.keys() == KINDS.keys()


# -- other formats -----------------------------------------------------------------------------------------------

SOURCES = [0, 1, 1, 2]  # those of OVERLAPPING
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` in bfloat16 and several shards, `nf4-dq` and `int8` made of it, `dense` made of those, and `adapter`."""
    folder = tmp_path_factory.mktemp("replication")
    config = AutoConfig.for_model("llama", **SIZES)
    base = save_base(folder / "base", config, dtype=torch.bfloat16, max_shard_size="30KB")
    for quant in ("nf4-dq", "int8"):
        streamconv.convert(base, folder / quant, quant=quant)
        streamconv.convert(folder / quant, folder / f"dense {quant}", quant="none", dtype="float32")
    fields = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*QV, "down_proj"],
        modules_to_save=["lm_head"],
        layer_replication=OVERLAPPING,
        task_type="CAUSAL_LM",
    )
    save_adapter(folder / "adapter", base, fields)
    return folder


def source_of(name: str) -> str:
    """The tensor of the base that tensor `name` of a result is a copy of."""
    return re.sub(r"layers\.(\d+)", lambda match: f"layers.{SOURCES[int(match[1])]}", name)


def is_adapted(name: str) -> bool:
    return any(f".{module}." in f".{name}." for module in (*QV, "down_proj", "lm_head"))


@pytest.mark.parametrize("base", ["base", "nf4-dq", "int8"])
def test_what_the_adapter_leaves_alone_is_copied_to_every_copy(
    place: Path, tmp_path: Path, base: str
) -> None:
    streamconv.merge(place / base, place / "adapter", tmp_path / "out")
    found, stored = tensors(tmp_path / "out"), tensors(place / base)
    copied = {name for name in found if not is_adapted(name)}
    assert {source_of(name) for name in copied} == {name for name in stored if not is_adapted(name)}
    assert all(torch.equal(found[name], stored[source_of(name)]) for name in copied)
    assert {source_of(name) for name in found} == stored.keys()
    assert len(linear4bit(open_model(tmp_path / "out"))) == (4 * len(LINEAR) if base == "nf4-dq" else 0)
    streamconv.verify(tmp_path / "out", full=True, base=place / base, adapter=place / "adapter")


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "fp4", "int8"])
def test_quantized_results_load_as_the_values_we_decode(place: Path, tmp_path: Path, quant: str) -> None:
    streamconv.merge(place / "base", place / "adapter", tmp_path / "out", quant=quant)
    model = open_model(tmp_path / "out")
    expected = decoded_by_us(tmp_path / "out")
    assert expected.keys() == {
        f"model.layers.{layer}.{'mlp' if name in LINEAR[4:] else 'self_attn'}.{name}"
        for layer in range(4)
        for name in LINEAR
    }
    if quant != "int8":
        found = dequantized(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].float(), values) for name, values in expected.items())
    streamconv.convert(tmp_path / "out", tmp_path / "dense", quant="none", dtype="float32")
    merged = streamconv.merge(place / "base", place / "adapter", tmp_path / "exact", dtype="float32")
    assert merged.kept_delta is None
    dense, exact = tensors(tmp_path / "dense"), tensors(tmp_path / "exact")
    assert dense.keys() == exact.keys()
    for name, values in exact.items():  # half of the widest gap between codes
        assert float((dense[name] - values).abs().max()) <= 0.26 * float(values.abs().max()), name
    streamconv.verify(tmp_path / "out", full=True, base=place / "base", adapter=place / "adapter")


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_a_quantized_base_is_what_it_dequantizes_to(place: Path, tmp_path: Path, quant: str) -> None:
    options: Mapping[str, Any] = {"quant": "none", "dtype": "float32"}
    streamconv.merge(place / quant, place / "adapter", tmp_path / "out", **options)
    streamconv.merge(place / f"dense {quant}", place / "adapter", tmp_path / "dense", **options)
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "dense")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_the_base_as_training_saw_it(place: Path, tmp_path: Path) -> None:
    options: Mapping[str, Any] = {"quant": "none", "dtype": "float32"}
    streamconv.merge(place / "base", place / "adapter", tmp_path / "out", merge_base="nf4-dq", **options)
    streamconv.merge(place / "nf4-dq", place / "adapter", tmp_path / "dense", **options)
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "dense")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("quant", ["keep", "nf4"])
def test_an_interrupted_run_ends_with_the_same_bytes(place: Path, tmp_path: Path, quant: str) -> None:
    options: Mapping[str, Any] = {"quant": quant, "max_shard_size": 1_000}  # a weight a shard, nearly
    whole = streamconv.merge(place / "base", place / "adapter", tmp_path / "whole", **options)
    assert len(whole.shards) > 20

    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 24:  # the writer is a few weights behind
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamconv.merge(place / "base", place / "adapter", tmp_path / "out", on_progress=stop, **options)
    report = streamconv.merge(place / "base", place / "adapter", tmp_path / "out", **options)
    assert report.resumed
    assert report.shards == whole.shards
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "whole" / "config.json"
    ).read_bytes()
