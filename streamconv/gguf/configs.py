"""config.json of a model as transformers has it, from the header of a GGUF file: `hyperparameters.py` the other way.

A key that is missing, or that no field of a config is known for, refuses the model: nothing is guessed. Where
llama.cpp computes in one way only, whatever the file says, that is what the config says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from streamconv.gguf.header_fields import HeaderFields, shortest
from streamconv.gguf.hyperparameters import LARGEST_GEMMA
from streamconv.gguf.names import EMBEDDING, OUTPUT
from streamconv.gguf.rope import llama3_factors

Config = dict[str, Any]
Load = Callable[[str], list[float]]
"""Values of a small tensor by its name; empty where there is none."""

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({FACTORS, LONG, SHORT})
"""Tensors of factors, which a config has as numbers."""

_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Llama 3.1, 3.2 and 3.3 have factors of these numbers, and of 8 or 32.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _shared(header: HeaderFields) -> Config:
    """Fields that all architectures have."""
    heads = header.whole("attention.head_count")
    size = header.whole("attention.key_length", header.whole("embedding_length") // heads)
    if header.whole("attention.value_length", size) != size:
        raise header.refuse("attention.value_length", "heads of values are as wide as those of keys")
    header.skip("vocab_size")
    theta = header.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise header.refuse("rope.freq_base", "it must be above 0")
    return {
        "hidden_size": header.whole("embedding_length"),
        "intermediate_size": header.whole("feed_forward_length"),
        "num_hidden_layers": header.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.whole("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": header.whole("context_length"),
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
    }


def _scaling(header: HeaderFields) -> Config:
    """`rope_scaling` of the kinds that all architectures have."""
    kind = header.text("rope.scaling.type", "none")
    header.skip("rope.scaling.finetuned")
    if kind == "none":
        return {}
    found: Config = {"rope_type": kind, "factor": header.number("rope.scaling.factor")}
    if kind == "yarn":
        before = header.whole("rope.scaling.original_context_length")
        found["original_max_position_embeddings"] = before
        for name in ("beta_fast", "beta_slow"):
            if header.has(f"rope.scaling.yarn_{name}"):
                found[name] = header.number(f"rope.scaling.yarn_{name}")
    elif kind != "linear":
        raise header.refuse("rope.scaling.type", "expected none, linear or yarn for this architecture")
    return {"rope_scaling": found}


def _whole_heads(header: HeaderFields, config: Config) -> None:
    """Raise UnsupportedError where a part of a head is rotated only."""
    if header.whole("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise header.refuse("rope.dimension_count", f"a head has {config['head_dim']} dimensions")


def _equal_heads(header: HeaderFields, config: Config) -> Config:
    """The config without `head_dim`, which its class has no field for."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise header.refuse("attention.key_length", "all heads together are as wide as the model")
    return {name: value for name, value in config.items() if name != "head_dim"}


def _llama(header: HeaderFields, load: Load) -> Config:
    config = _shared(header)
    _whole_heads(header, config)
    header.skip("tensor_data_layout")
    config |= {"model_type": "llama", "hidden_act": "silu", **_scaling(header)}
    factors = load(FACTORS)
    if not header.has("attention.key_length") and not factors:
        config = _equal_heads(header, config)
    return config | (_llama3(header, config, factors) if factors else {})


def _llama3(header: HeaderFields, config: Config, factors: list[float]) -> Config:
    """`rope_scaling` of Llama 3, if its usual numbers give these factors; of others they do not tell which they are."""
    usual = {**_LLAMA3, "factor": shortest(max(factors))}
    made = []
    if 0 < usual["factor"] < math.inf:
        made = llama3_factors(usual["factor"], 1.0, 4.0, 8192, config["rope_theta"], config["head_dim"])
    is_same = len(made) == len(factors) and all(
        math.isclose(one, other, rel_tol=1e-5) for one, other in zip(made, factors, strict=True)
    )
    if not is_same or "rope_scaling" in config:
        raise header.refuse(
            "rope.freq_base",
            f"{FACTORS} has factors of rotations that do not tell the rope_scaling of config.json they were made of",
        )
    return {"rope_scaling": {"rope_type": "llama3", **usual}}


def _qwen2(header: HeaderFields, load: Load) -> Config:
    del load
    config = _shared(header)
    _whole_heads(header, config)
    config |= {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, **_scaling(header)}
    return _equal_heads(header, config)


def _qwen3(header: HeaderFields, load: Load) -> Config:
    del load
    config = _shared(header)
    _whole_heads(header, config)
    plain = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    return config | {"model_type": "qwen3", **plain, **_scaling(header)}


def _qwen3moe(header: HeaderFields, load: Load) -> Config:
    return _qwen3(header, load) | {
        "model_type": "qwen3_moe",
        "num_experts": header.whole("expert_count"),
        "num_experts_per_tok": header.whole("expert_used_count"),
        "moe_intermediate_size": header.whole("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(header: HeaderFields, generation: int) -> Config:
    config = _shared(header)
    _whole_heads(header, config)
    is_largest = config["num_hidden_layers"] == LARGEST_GEMMA[generation]
    scale = config["hidden_size"] / config["num_attention_heads"] if is_largest else config["head_dim"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": header.whole("attention.sliding_window"),
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
    }


def _gemma2(header: HeaderFields, load: Load) -> Config:
    del load
    return _gemma(header, 2) | {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": header.number("attn_logit_softcapping"),
        "final_logit_softcapping": header.number("final_logit_softcapping"),
        **_scaling(header),
    }


def _gemma3(header: HeaderFields, load: Load) -> Config:
    del load
    capped = header.number("final_logit_softcapping") if header.has("final_logit_softcapping") else None
    if header.whole("attention.sliding_window_pattern", 6) != 6:
        raise header.refuse("attention.sliding_window_pattern", "in llama.cpp every layer 6 attends to all")
    return _gemma(header, 3) | {
        "model_type": "gemma3_text",
        "rope_local_base_freq": header.number("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": 6,
        "final_logit_softcapping": capped,
        "attn_logit_softcapping": None,
        **_scaling(header),
    }


def _phi3(header: HeaderFields, load: Load) -> Config:
    config = _shared(header)
    size, before = config["head_dim"], header.whole("rope.scaling.original_context_length")
    turned = header.whole("rope.dimension_count", size)
    window = header.window("attention.sliding_window")
    config |= {
        "model_type": "phi3",
        "hidden_act": "silu",
        "original_max_position_embeddings": before,
        "sliding_window": window or None,
        "attention_bias": False,
    }
    if turned != size:
        config["partial_rotary_factor"] = turned / size
    longer, shorter = load(LONG), load(SHORT)
    scaling = _long(header, config, longer, shorter, turned) if longer or shorter else _scaling(header)
    return _equal_heads(header, config | scaling)


def _long(
    header: HeaderFields, config: Config, longer: list[float], shorter: list[float], turned: int
) -> Config:
    """`rope_scaling` of Phi-3 with long contexts."""
    if not len(longer) == len(shorter) == turned // 2:
        raise header.refuse("rope.dimension_count", f"{LONG} and {SHORT} have factors for another number")
    if header.text("rope.scaling.type", "longrope") != "longrope":
        raise header.refuse("rope.scaling.type", f"{LONG} is of longrope")
    before = config["original_max_position_embeddings"]
    scale = config["max_position_embeddings"] / before
    usual = math.sqrt(1 + math.log(scale) / math.log(max(2, before))) if scale > 1 else 1.0
    found: Config = {"type": "longrope", "long_factor": longer, "short_factor": shorter}
    stated = header.number("rope.scaling.attn_factor", usual)
    if not math.isclose(stated, usual, rel_tol=1e-6):
        found["attention_factor"] = stated
    return {"rope_scaling": found}


def _gpt_oss(header: HeaderFields, load: Load) -> Config:
    del load
    config = _shared(header)
    _whole_heads(header, config)
    inner = config["intermediate_size"]
    if header.whole("expert_feed_forward_length", inner) != inner:
        raise header.refuse("expert_feed_forward_length", "feed_forward_length is another")
    # Without settings of its rotation, transformers takes those of OpenAI's models; llama.cpp, none.
    scaling = _scaling(header).get("rope_scaling", {"rope_type": "default"})
    if scaling["rope_type"] == "yarn":
        scaling["truncate"] = False  # which all that were trained have, and no header tells
    layers = range(config["num_hidden_layers"])
    return config | {
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "attention_bias": True,
        "num_local_experts": header.whole("expert_count"),
        "num_experts_per_tok": header.whole("expert_used_count"),
        "sliding_window": header.whole("attention.sliding_window"),
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in layers],
        "swiglu_limit": 7.0,
        "rope_scaling": scaling,
    }


_BY_ARCHITECTURE: Mapping[str, Callable[[HeaderFields, Load], Config]] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "qwen3moe": _qwen3moe,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "phi3": _phi3,
        "gpt-oss": _gpt_oss,
    }
)
READABLE = tuple(_BY_ARCHITECTURE)
"""Architectures whose headers are known to tell what a config.json says."""


def model_config(header: HeaderFields, names: frozenset[str], rows: int, load: Load) -> Config:
    """config.json of a model with tensors of these names, and an embedding of so many rows.

    Raises CheckpointError for keys that are missing or of a wrong type, UnsupportedError for what no config says.
    """
    config = _BY_ARCHITECTURE[header.architecture](header, load)
    header.check_all_seen()
    if header.architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in names
        config["mlp_bias"] = "blk.0.ffn_down.bias" in names
    assert EMBEDDING in names, "checked before"
    ids = {field: header.pairs.get(f"tokenizer.ggml.{role}_token_id") for field, role in _IDS.items()}
    return {**config, "vocab_size": rows, "tie_word_embeddings": OUTPUT not in names, **ids}
