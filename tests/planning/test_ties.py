"""Whether a base ties its head to its embedding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import streamconv
from streamconv.adapters.base import Tie
from streamconv.errors import AdapterError, UnsupportedError
from streamconv.formats import find_weights
from streamconv.planning.ties import find_tie
from tests.checkpoint.files import index_of
from tests.models import Sizes, write_base
from tests.tiny import (
    TOKENS,
    edit_tensors,
    llama_config,
    load_base,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

SIZES = Sizes(hidden=64, inner=96, layers=2, vocabulary=300)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CAUSAL = ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("config", "head_is_stored", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True, "architectures": CAUSAL}, False, True),
        ({"tie_word_embeddings": False, "architectures": CAUSAL}, False, False),
        ({"tie_word_embeddings": False}, True, False),
        ({}, True, False),
        ({"architectures": CAUSAL}, False, True),
        ({"architectures": ["LlamaModel"]}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"text_config": {"tie_word_embeddings": False}, "architectures": CAUSAL}, False, False),
        (
            {
                "tie_word_embeddings": True,
                "text_config": {"tie_word_embeddings": False},
                "architectures": CAUSAL,
            },
            False,
            True,
        ),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True, False),
        (
            {
                "tie_word_embeddings": False,
                "text_config": {"tie_word_embeddings": True},
                "architectures": CAUSAL,
            },
            False,
            False,
        ),
    ],
    ids=json.dumps,
)
def test_what_is_tied(tmp_path: Path, config: Mapping[str, Any], head_is_stored: bool, tied: bool) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if not head_is_stored:
        edit_tensors(base / "model.safetensors", drop=[HEAD])
    index = index_of(base)
    weights = {weight.name: weight for weight in find_weights(index)}
    assert find_tie(weights, index.config) == (Tie(EMBEDDING, HEAD) if tied else None)


# -- heads of other names ------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
BERT = BertConfig(**SMALL, intermediate_size=72)
SPEECH = WhisperConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=72,
    decoder_ffn_dim=72,
    vocab_size=40,
    num_mel_bins=8,
    max_source_positions=10,
    max_target_positions=20,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
SOUND = {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).reshape(2, 8, 20), "decoder_input_ids": TOKENS}
TEXT = {"input_ids": TOKENS}
ROBERTA = RobertaConfig(**SMALL, intermediate_size=72)
T5 = T5Config(d_model=32, d_kv=8, d_ff=72, num_layers=1, num_heads=4, vocab_size=40, decoder_start_token_id=0)
BART = BartConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=72,
    decoder_ffn_dim=72,
    vocab_size=40,
)
MARIAN = MarianConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=72,
    decoder_ffn_dim=72,
    vocab_size=40,
    pad_token_id=0,
    decoder_start_token_id=0,
    max_position_embeddings=64,
)
HANDLED: dict[str, tuple[type[Any], Any, Mapping[str, Any], Mapping[str, Any]]] = {
    "Whisper, head saved": (
        WhisperForConditionalGeneration,
        SPEECH,
        {"modules_to_save": ["proj_out"]},
        SOUND,
    ),
    "Whisper, LoRA on the head": (
        WhisperForConditionalGeneration,
        SPEECH,
        {"target_modules": ["proj_out"]},
        SOUND,
    ),
    "Whisper, trained tokens": (
        WhisperForConditionalGeneration,
        SPEECH,
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
        SOUND,
    ),
    "BERT, LoRA on the embedding": (BertForMaskedLM, BERT, {"target_modules": ["word_embeddings"]}, TEXT),
    "BERT, head saved": (BertForMaskedLM, BERT, {"modules_to_save": ["decoder"]}, TEXT),
    "RoBERTa, head saved whole": (RobertaForMaskedLM, ROBERTA, {"modules_to_save": ["lm_head"]}, TEXT),
}


def trained(folder: Path, cls: type[Any], config: Any, options: Mapping[str, Any]) -> tuple[Path, Any]:
    base = save_base(folder / "base", config, auto_class=Class(cls))
    query = ["query"] if "bert" in config.model_type else ["q"] if config.model_type == "t5" else ["q_proj"]
    lora = {"r": 4, **options, "target_modules": [*query, *options.get("target_modules", ())]}
    return base, save_adapter(folder / "adapter", base, LoraConfig(**lora), auto_class=cls)


@dataclass(frozen=True, slots=True)
class Class:
    """An auto class that makes a model of one class."""

    made: type[Any]

    def from_config(self, config: Any) -> Any:
        return self.made(config)


@pytest.mark.parametrize("case", HANDLED.values(), ids=HANDLED)
def test_a_tied_head_of_another_name_is_pefts(tmp_path: Path, case: Any) -> None:
    cls, config, options, inputs = case
    base, adapter = trained(tmp_path, cls, config, options)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found, expected = model.eval()(**inputs).logits, adapter.live(**inputs).logits
        before = cls.from_pretrained(base).eval()(**inputs).logits
    assert (found - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("cls", "config", "options", "message"),
    [
        (
            T5ForConditionalGeneration,
            T5,
            {"target_modules": ["lm_head"]},
            "lm_head.weight, .* 't5' .* shared.weight",
        ),
        (
            BartForConditionalGeneration,
            BART,
            {"modules_to_save": ["lm_head"]},
            "is tied to model.shared.weight",
        ),
        (
            MarianMTModel,
            MARIAN,
            {"modules_to_save": ["lm_head"]},
            "is tied to model.shared.weight",
        ),
        (
            BartForConditionalGeneration,
            BART,
            {"target_modules": ["embed_tokens"]},
            "is tied to model.shared.weight",
        ),
    ],
)
def test_one_of_several_that_are_tied_is_refused(
    tmp_path: Path, cls: type[Any], config: Any, options: Mapping[str, Any], message: str
) -> None:
    base, adapter = trained(tmp_path, cls, config, options)
    with pytest.raises(UnsupportedError, match=message):
        streamconv.merge(base, adapter.path, tmp_path / "out")


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_tying_that_is_ensured_on_a_base_in_16_bit(tmp_path: Path, options: Mapping[str, Any]) -> None:
    base = save_base(tmp_path / "base", llama_config(tied=True), dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, **options, ensure_weight_tying=True))
    streamconv.merge(base, adapter.path, tmp_path / "out", dtype="float32")
    # On such a base PEFT casts the factors of embedding and head, which parts them.
    is_tied = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert is_tied is ("modules_to_save" in options)
    found = load_base(tmp_path / "out").float()
    assert (logits(found) - logits(adapter.live.float())).abs().max() < 1e-4


def test_factors_that_only_a_cast_can_part(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(tied=True))
    lora = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter = save_adapter(tmp_path / "adapter", base, lora)
    streamconv.merge(base, adapter.path, tmp_path / "out")
    name = "base_model.model.lm_head.lora_A.weight"
    file = adapter.path / "adapter_model.safetensors"
    edit_tensors(file, put={name: read_tensors(file)[name] + 1})
    with pytest.raises(AdapterError, match=r"lm_head\.lora_A\.weight must be .* transposed, and it is not"):
        streamconv.merge(base, adapter.path, tmp_path / "other")
