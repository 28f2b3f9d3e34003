"""Other families than Llama: where their heads and embeddings are, what they tie, what loaders call it.

Same reference and tolerance as test_end_to_end.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

import streamconv
from tests.parity.opening import decoded_by_us, dequantized, logits_differ_by, open_model
from tests.tiny import VOCABULARY, logits, save_adapter, save_base

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
GEMMA: dict[str, Any] = GROUPED | {"head_dim": 8}
# For each: heads with biases; heads that files call by another name; fused projections; names of their own.
USUAL: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**GEMMA),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "cohere": CohereConfig(**GROUPED),
    "falcon": FalconConfig(**SIZES),
    "gemma": GemmaConfig(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "glm4": Glm4Config(**GEMMA, pad_token_id=0),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "granite": GraniteConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "mpt": MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "olmo2": Olmo2Config(**GROUPED),
    "phi": PhiConfig(**SIZES),
    "qwen3": Qwen3Config(**GEMMA),
    "smollm3": SmolLM3Config(**GROUPED, pad_token_id=0),
    "stablelm": StableLmConfig(**GROUPED),
    "starcoder2": Starcoder2Config(**GROUPED),
}
families = pytest.mark.parametrize(
    ("family", "config"),
    [
        *(pytest.param(family, config, id=family) for family, config in USUAL.items()),
        *(
            pytest.param(family, config, id=family, marks=pytest.mark.sweep)
            for family, config in OTHERS.items()
        ),
    ],
)
FORMS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "head saved": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
}


@families
@pytest.mark.parametrize("form", FORMS)
def test_merged_files_are_the_live_model(
    family: str, config: PreTrainedConfig, form: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", config, max_shard_size="40KB")
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **FORMS[form])
    adapter = save_adapter(tmp_path / "adapter", base, lora)
    streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"))
    assert logits_differ_by(open_model(tmp_path / "out"), adapter.logits()) < 1e-4


@families
def test_4_bit_files_load_as_the_values_we_decode(
    family: str, config: PreTrainedConfig, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    if family == "falcon":  # its projections are a subclass of Linear, which loaders leave alone
        with pytest.raises(streamconv.OptionError, match="would quantize nothing"):
            streamconv.convert(str(base), str(tmp_path / "out"), quant="nf4-dq")
        return
    streamconv.convert(str(base), str(tmp_path / "out"), quant="nf4-dq")
    model = open_model(tmp_path / "out")
    found, expected = dequantized(model), decoded_by_us(tmp_path / "out")
    assert set(found) == set(expected) != set()
    assert all(torch.equal(found[module].float(), values) for module, values in expected.items())
    streamconv.convert(str(tmp_path / "out"), str(tmp_path / "dense"), quant="none")
    assert logits_differ_by(model, logits(open_model(tmp_path / "dense"))) < 1e-6


def test_an_embedding_that_may_be_tied_to_something_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", MambaConfig(**{"state_size": 4} | SIZES))
    lora = LoraConfig(r=4, target_modules=["x_proj"], modules_to_save=["embeddings"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, lora)
    with pytest.raises(streamconv.UnsupportedError, match=r"backbone\.embeddings\.weight.*'mamba'"):
        streamconv.merge(str(base), str(adapter.path), str(tmp_path / "out"))
