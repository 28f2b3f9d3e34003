"""Every form of LoRA on every kind of model: files to files, opened with stock transformers, against PEFT's live model.

One table. All in float32, where the two sides differ by the order of additions only. `peft is wrong` marks forms whose
own merge by PEFT 0.21.2 gives another model than the live one; that it does is asserted.
"""

# ruff: noqa: E501  a table reads best with one form a line

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.lora.config import BdLoraConfig, EvaConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    ConvNextConfig,
    Gemma3Config,
    GptOssConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

import streamconv
from tests.parity.opening import merged_by_peft, open_model, relative_difference
from tests.tiny import (
    TOKENS,
    VOCABULARY,
    Adapter,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

TOLERANCE = 1e-4
WEIGHTS = "adapter_model.safetensors"
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def classifier_config() -> PreTrainedConfig:
    config = llama_config()
    config.num_labels, config.pad_token_id = 3, 0
    return config


@dataclass(frozen=True, slots=True)
class Model:
    """How a base is made, opened and run."""

    config: PreTrainedConfig
    auto_class: Any = AutoModelForCausalLM
    sees: bool = False


MODELS: Mapping[str, Model] = {
    "llama": Model(llama_config()),
    "tied": Model(llama_config(tied=True)),
    "qwen2": Model(Qwen2Config(**_SIZES)),
    "gpt2": Model(gpt2_config()),
    "phi3": Model(Phi3Config(**_SIZES, pad_token_id=0)),
    "mixtral": Model(MixtralConfig(**_SIZES, num_local_experts=3)),
    "qwen3_moe": Model(
        Qwen3MoeConfig(**_SIZES, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2, head_dim=8)
    ),
    "square_moe": Model(  # 2 · 16 = 32: gate_up_proj of an expert is square
        Qwen3MoeConfig(**_SIZES, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, head_dim=8)
    ),
    "gpt_oss": Model(
        GptOssConfig(
            **_SIZES,
            num_local_experts=3,
            head_dim=8,
            num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
        )
    ),
    "gpt_oss_square": Model(  # of an expert of gpt-oss-20b, too, down_proj is square
        GptOssConfig(
            **_SIZES | {"intermediate_size": 32},
            num_local_experts=3,
            head_dim=8,
            num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
        )
    ),
    "qwen3_vl_moe": Model(  # trains the transpose of what it stores
        Qwen3VLMoeConfig(
            text_config=_SIZES
            | {
                "num_experts": 4,
                "moe_intermediate_size": 24,
                "num_experts_per_tok": 2,
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": 32,
                "num_position_embeddings": 4,
                "deepstack_visual_indexes": [0],
            },
        ),
        AutoModelForImageTextToText,
    ),
    "gemma3": Model(
        Gemma3Config(
            text_config=_SIZES | {"head_dim": 8, "sliding_window": 16},
            vision_config=_VISION,
            mm_tokens_per_image=4,
        ),
        AutoModelForImageTextToText,
    ),
    "classifier": Model(classifier_config(), AutoModelForSequenceClassification),
    "convnext": Model(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, image_size=32),
        AutoModelForImageClassification,
        sees=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Form:
    """One row: fields of LoraConfig, what the result must be like, and whether PEFT's own merge is wrong."""

    model: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    untied: bool = False
    resize_to: int | None = None
    peft_is_wrong: bool = False

    def __str__(self) -> str:
        return f"{self.model}: {self.name}"


EMBED, HEAD = ["embed_tokens"], ["lm_head"]
QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BOTH_ROWS = {"embed_tokens": [3, 1], "lm_head": [2]}


def blocks(number: int, **fields: Any) -> BdLoraConfig:
    """Block-diagonal as tensor parallelism cuts layers."""
    row_cut, column_cut = ["o_proj", "down_proj"], ["q_proj", "up_proj"]
    return BdLoraConfig(target_modules_bd_a=row_cut, target_modules_bd_b=column_cut, nblocks=number, **fields)


def targets(*names: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **fields}


FORMS = [
    Form("llama", "embedding", targets("embed_tokens")),
    Form("llama", "embedding by dora", targets("embed_tokens", use_dora=True)),
    Form("llama", "embedding, rslora and patterns", targets("embed_tokens", "q_proj", use_rslora=True, rank_pattern={"embed_tokens": 3}, alpha_pattern={"embed_tokens": 9})),
    Form("llama", "embedding and head", targets("embed_tokens", "lm_head", "q_proj")),
    Form("tied", "embedding", targets("embed_tokens"), untied=True, peft_is_wrong=True),
    Form("tied", "embedding by dora", targets("embed_tokens", use_dora=True), untied=True, peft_is_wrong=True),
    Form("tied", "embedding and head", targets("embed_tokens", "lm_head"), untied=True, peft_is_wrong=True),
    Form("tied", "embedding and head by dora", targets("embed_tokens", "lm_head", use_dora=True), untied=True, peft_is_wrong=True),
    Form("tied", "embedding and head as one", targets("embed_tokens", ensure_weight_tying=True), peft_is_wrong=True),
    Form("tied", "embedding and head by dora, meant as one", targets("embed_tokens", ensure_weight_tying=True, use_dora=True), untied=True, peft_is_wrong=True),
    Form("gpt2", "embedding", targets("wte", "c_attn", fan_in_fan_out=True), untied=True, peft_is_wrong=True),
    Form("gpt2", "bias of lora_B", targets("c_attn", "c_proj", lora_bias=True, fan_in_fan_out=True)),
    Form("gpt2", "all biases", targets("c_attn", bias="all", fan_in_fan_out=True)),
    Form("gpt2", "adapted biases", targets("c_attn", "c_fc", bias="lora_only", fan_in_fan_out=True)),
    Form("gpt2", "both kinds of bias", targets("c_attn", bias="all", lora_bias=True, fan_in_fan_out=True)),
    Form("gpt2", "trained rows", targets("c_attn", trainable_token_indices=[7, 3], fan_in_fan_out=True)),
    Form("qwen2", "bias of lora_B", targets(*QV, lora_bias=True)),
    Form("qwen2", "all biases", targets("q_proj", "o_proj", bias="all")),
    Form("qwen2", "adapted biases by dora", targets(*QV, bias="lora_only", use_dora=True)),
    Form("llama", "biases of a model without", targets("q_proj", bias="all")),
    Form("llama", "trained rows", targets("q_proj", trainable_token_indices=[5, 3, 10])),
    Form("llama", "trained rows of both", targets("q_proj", trainable_token_indices=BOTH_ROWS)),
    Form("tied", "trained rows", targets("q_proj", trainable_token_indices=[5, 3, 10])),
    Form("tied", "trained rows of both, the same", targets("q_proj", trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [5, 3]})),
    Form("tied", "trained rows of both", targets("q_proj", trainable_token_indices=BOTH_ROWS), untied=True, peft_is_wrong=True),
    Form("tied", "trained rows of the head", targets("q_proj", trainable_token_indices={"lm_head": [5]}), untied=True, peft_is_wrong=True),
    Form("tied", "trained rows and head", targets("lm_head", trainable_token_indices=[5, 3]), untied=True, peft_is_wrong=True),
    Form("llama", "resized", targets("q_proj"), resize_to=44),
    Form("llama", "resized, embedding and head", targets("embed_tokens", "lm_head"), resize_to=44),
    Form("llama", "resized, trained rows", targets("q_proj", trainable_token_indices=[5, 42]), resize_to=44),
    Form("llama", "resized, saved", targets("q_proj", modules_to_save=[*EMBED, *HEAD]), resize_to=44),
    Form("tied", "resized", targets("q_proj"), resize_to=44),
    Form("tied", "resized, embedding", targets("embed_tokens"), resize_to=44, untied=True, peft_is_wrong=True),
    Form("tied", "resized, head", targets("q_proj", "lm_head"), resize_to=44, untied=True, peft_is_wrong=True),
    Form("tied", "resized, embedding and head as one", targets("embed_tokens", ensure_weight_tying=True), resize_to=44, peft_is_wrong=True),
    Form("tied", "resized, trained rows", targets("q_proj", trainable_token_indices=[5, 42]), resize_to=44),
    Form("tied", "cut down", targets("q_proj"), resize_to=36),
    Form("llama", "pissa", targets("q_proj", "k_proj", "up_proj", "down_proj", init_lora_weights="pissa")),
    Form("llama", "pissa by dora, patterns", targets(*QV, init_lora_weights="pissa", use_dora=True, rank_pattern={"q_proj": 7})),
    Form("llama", "olora", targets("q_proj", "up_proj", "down_proj", init_lora_weights="olora", use_rslora=True)),
    Form("gpt2", "pissa", targets("c_attn", "c_proj", init_lora_weights="pissa", fan_in_fan_out=True)),
    Form("llama", "embedding and head by pissa", targets("embed_tokens", "lm_head", "q_proj", init_lora_weights="pissa")),
    Form("llama", "head by pissa", targets("lm_head", "q_proj", init_lora_weights="pissa")),
    Form("tied", "resized, head by pissa", targets("lm_head", "q_proj", init_lora_weights="pissa"), resize_to=44, untied=True, peft_is_wrong=True),
    Form("tied", "head by pissa", targets("lm_head", "q_proj", init_lora_weights="pissa"), untied=True, peft_is_wrong=True),
    Form("tied", "head by olora", targets("lm_head", init_lora_weights="olora"), untied=True, peft_is_wrong=True),
    Form("llama", "mica", targets(*QV, init_lora_weights="mica")),
    Form("llama", "velora", targets(*QV, velora_config=VeloraConfig(num_groups=4))),
    Form("llama", "monteclora", targets(*QV, monteclora_config=MontecloraConfig())),
    Form("llama", "eva", targets(*QV, init_lora_weights="eva", eva_config=EvaConfig())),
    Form("llama", "kasa", targets("q_proj", "up_proj", "down_proj", kasa_config=KasaConfig(), use_rslora=True, rank_pattern={"q_proj": 7})),
    Form("llama", "kasa, head", targets("lm_head", "q_proj", kasa_config=KasaConfig())),
    Form("tied", "kasa, head", targets("lm_head", "q_proj", kasa_config=KasaConfig()), untied=True, peft_is_wrong=True),
    Form("qwen2", "kasa, bias of lora_B", targets(*QV, kasa_config=KasaConfig(), lora_bias=True)),
    Form("llama", "blocks of A and B", targets("q_proj", "o_proj", "up_proj", "down_proj", use_bdlora=blocks(4))),
    Form("llama", "blocks here and there", targets("q_proj", "v_proj", "o_proj", use_bdlora=blocks(2, match_strict=False))),
    Form("llama", "blocks, one", targets("q_proj", "o_proj", use_bdlora=blocks(1))),
    Form("llama", "qa-lora of layers that are not GPTQ, which PEFT does not pool", targets(*QV, use_qalora=True, qalora_group_size=8)),
    Form("llama", "orthogonal", targets(*QV, init_lora_weights="orthogonal")),
    Form("phi3", "fused projections", targets("qkv_proj", "gate_up_proj", use_dora=True)),
    Form("classifier", "head saved", targets(*QV, task_type="SEQ_CLS")),
    Form("classifier", "embedding", targets("embed_tokens", task_type="SEQ_CLS")),
    Form("convnext", "convolutions", {"target_modules": r".*(patch_embeddings|downsampling_layer\.1|pwconv1)", "task_type": None}),
    Form("convnext", "convolutions by dora", {"target_modules": r".*(patch_embeddings|downsampling_layer\.1)", "use_dora": True, "task_type": None}),
    Form("convnext", "bias of lora_B", {"target_modules": r".*(patch_embeddings|downsampling_layer\.1)", "lora_bias": True, "task_type": None}),
    Form("mixtral", "experts", targets("q_proj", target_parameters=EXPERTS)),
    Form("mixtral", "one parameter of the experts", targets(target_parameters=["experts.down_proj"])),
    Form("qwen3_moe", "experts", targets("q_proj", target_parameters=EXPERTS, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"experts.down_proj": 5})),
    Form("qwen3_moe", "router", targets(target_parameters=["mlp.gate.weight"])),
    Form("square_moe", "experts", targets(target_parameters=EXPERTS)),
    Form("gpt_oss", "experts", targets("q_proj", target_parameters=EXPERTS, use_rslora=True)),
    Form("gpt_oss_square", "experts", targets(target_parameters=EXPERTS)),
    Form("qwen3_vl_moe", "experts", targets("q_proj", target_parameters=EXPERTS)),
    Form("gemma3", "names of transformers 5", targets(*QV)),
    Form("gemma3", "head", targets("lm_head"), untied=True, peft_is_wrong=True),
    Form("gemma3", "resized, saved", targets("q_proj", modules_to_save=EMBED, ensure_weight_tying=True), resize_to=44),
]  # fmt: skip


def outputs(model: torch.nn.Module, sees: bool) -> Tensor:
    with torch.no_grad():
        found: Tensor = (model(pixel_values=PIXELS) if sees else model(input_ids=TOKENS)).logits
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: save_base(folder / name, model.config, auto_class=model.auto_class)
        for name, model in MODELS.items()
    }


def matters(adapter: Adapter, expected: Tensor, sees: bool) -> bool:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers", category=UserWarning)
        with adapter.live.disable_adapter():
            return relative_difference(outputs(adapter.live, sees), expected) > 1e-3


def adapter_of(form: Form, bases: Mapping[str, Path], folder: Path) -> Adapter:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | dict(form.config))
    auto_class = MODELS[form.model].auto_class
    adapter = save_adapter(folder, bases[form.model], config, auto_class=auto_class, resize_to=form.resize_to)
    if form.resize_to is not None:
        (folder / "tokenizer.json").write_text('{"version": "the adapter\'s"}')
    return adapter


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_merged_files_are_the_live_model(form: Form, bases: dict[str, Path], tmp_path: Path) -> None:
    model = MODELS[form.model]
    adapter = adapter_of(form, bases, tmp_path / "adapter")
    expected = outputs(adapter.live, model.sees)
    assert form.resize_to is not None or matters(adapter, expected, model.sees)
    streamconv.merge(bases[form.model], adapter.path, tmp_path / "out")
    merged = open_model(tmp_path / "out", model.auto_class)
    assert relative_difference(outputs(merged, model.sees), expected) < TOLERANCE
    if not model.sees:
        ties = [config.get_text_config().tie_word_embeddings for config in (model.config, merged.config)]
        assert ties[1] is (ties[0] and not form.untied)
    if form.resize_to is not None:
        assert merged.config.get_text_config().vocab_size == form.resize_to
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
            adapter.path / "tokenizer.json"
        ).read_bytes()
    if form.peft_is_wrong:
        assert relative_difference(outputs(merged_by_peft(adapter), model.sees), expected) > 1e-3


@pytest.mark.parametrize(
    "form",
    [
        Form("llama", "groups of inputs", targets("q_proj", "up_proj", "down_proj", use_rslora=True)),
        Form("gpt2", "groups of inputs", targets("c_attn", "attn.c_proj", fan_in_fan_out=True)),
    ],
    ids=str,
)
def test_pooled_inputs_are_those_of_the_live_model(
    form: Form, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT pools the inputs of GPTQ layers only, and merges none of them; here its variant runs on plain ones."""
    monkeypatch.setattr(Linear, "resolve_lora_variant", lambda *_, **__: QALoraLinearVariant())
    pooled = replace(form, config={**form.config, "use_qalora": True, "qalora_group_size": 8})
    adapter = adapter_of(pooled, bases, tmp_path / "adapter")
    factors = read_tensors(adapter.path / WEIGHTS)
    assert {tensor.shape[1] for name, tensor in factors.items() if "lora_A" in name} <= {4, 9}
    expected = outputs(adapter.live, sees=False)
    assert matters(adapter, expected, sees=False)
    streamconv.merge(bases[form.model], adapter.path, tmp_path / "out")
    assert relative_difference(outputs(open_model(tmp_path / "out"), sees=False), expected) < TOLERANCE
