"""Hyperparameters of a config.json as pairs of a GGUF header (`docs/gguf.md` of ggml, `llama-arch.cpp`).

What llama.cpp computes in one way only, whatever the file says, is looked at here: where a config wants another, the
model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from streamconv.checkpoint.gguf_header import GgufValue, f32, u32
from streamconv.gguf.fields import Fields
from streamconv.gguf.rope import Rotary, long_rotary, rope_fields, rotary

Facts = tuple[dict[str, GgufValue], Rotary]


def head_size(config: Fields) -> int:
    return config.positive(
        "head_dim", config.positive("hidden_size") // config.positive("num_attention_heads")
    )


def heads(config: Fields) -> tuple[int, int]:
    """Numbers of heads of queries, and of keys and values."""
    count = config.positive("num_attention_heads")
    return count, config.positive("num_key_value_heads", count)


def _shared(config: Fields) -> dict[str, GgufValue]:
    """Pairs that all architectures have."""
    queries, keys = heads(config)
    pairs = {
        "block_count": u32(config.positive("num_hidden_layers")),
        "context_length": u32(config.positive("max_position_embeddings")),
        "embedding_length": u32(config.positive("hidden_size")),
        "feed_forward_length": u32(config.positive("intermediate_size")),
        "attention.head_count": u32(queries),
        "attention.head_count_kv": u32(keys),
        "attention.layer_norm_rms_epsilon": f32(config.number("rms_norm_eps", 1e-6)),
    }
    if config.has("head_dim"):
        pairs["attention.key_length"] = pairs["attention.value_length"] = u32(head_size(config))
    return pairs


def _check_activation(config: Fields, wanted: str) -> None:
    for name in ("hidden_activation", "hidden_act"):
        if config.has(name):
            if config.text(name, wanted) != wanted:
                raise config.refuse(name, f"llama.cpp computes {wanted} for this architecture")
            return


def _llama(config: Fields) -> Facts:
    _check_activation(config, "silu")
    size = head_size(config)
    pairs = _shared(config) | {"rope.dimension_count": u32(size)}
    return pairs, rotary(config, size, has_factors=True)


def _qwen(config: Fields) -> Facts:
    _check_activation(config, "silu")
    _check_all_attend(config)
    return _shared(config), rotary(config, head_size(config), has_factors=False)


def _check_all_attend(config: Fields) -> None:
    """Raise UnsupportedError where some layers attend to a window, and llama.cpp's attend to all."""
    kinds = config.values.get("layer_types")
    if config.values.get("use_sliding_window") is True or (
        isinstance(kinds, list) and "sliding_attention" in kinds
    ):
        name = "layer_types" if isinstance(kinds, list) else "use_sliding_window"
        raise config.refuse(name, "llama.cpp has no sliding window for this architecture")


def _qwen3moe(config: Fields) -> Facts:
    if config.values.get("norm_topk_prob") is not True:  # false where it is not stated
        raise config.refuse(
            "norm_topk_prob", "llama.cpp divides the weights of chosen experts by their sum, as if true"
        )
    pairs, found = _qwen(config)
    count = "num_experts" if config.has("num_experts") else "num_local_experts"
    pairs |= {
        "expert_count": u32(config.positive(count)),
        "expert_used_count": u32(config.positive("num_experts_per_tok")),
        "expert_feed_forward_length": u32(config.positive("moe_intermediate_size")),
    }
    return pairs, found


def _gpt_oss(config: Fields) -> Facts:
    _check_activation(config, "silu")
    for name, usual in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if config.number(name, usual) != usual:
            raise config.refuse(name, f"llama.cpp computes with {usual:g}")
    _check_kinds(config, 2)
    pairs = _shared(config) | {
        "expert_count": u32(config.positive("num_local_experts")),
        "expert_used_count": u32(config.positive("num_experts_per_tok")),
        "expert_feed_forward_length": u32(config.positive("intermediate_size")),
        "attention.sliding_window": u32(config.positive("sliding_window")),
    }
    return pairs, rotary(config, head_size(config), has_factors=False)


def _check_kinds(config: Fields, pattern: int) -> None:
    """Raise UnsupportedError unless every layer of so many attends to all, and others to a window."""
    layers, kinds = config.positive("num_hidden_layers"), config.values.get("layer_types")
    usual = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if kinds is not None and kinds != usual:
        raise config.refuse(
            "layer_types", f"in llama.cpp every layer {pattern} attends to all, and only these do"
        )


LARGEST_GEMMA = {2: 46, 3: 62}
"""Layers of the 27B models, whose queries llama.cpp scales otherwise."""


def _check_gemma(config: Fields, generation: int, pattern: int) -> None:
    """Raise UnsupportedError for a scale of queries, or kinds of layers, that llama.cpp computes otherwise."""
    _check_activation(config, "gelu_pytorch_tanh")
    layers, queries = config.positive("num_hidden_layers"), config.positive("num_attention_heads")
    is_largest = layers == LARGEST_GEMMA[generation]
    scale = config.positive("hidden_size") / queries if is_largest else config.positive("head_dim", 256)
    if config.number("query_pre_attn_scalar", 256) != scale:
        raise config.refuse("query_pre_attn_scalar", f"llama.cpp computes with {scale:g} for {layers} layers")
    _check_kinds(config, pattern)
    if config.positive("sliding_window_pattern", pattern) != pattern:
        raise config.refuse("sliding_window_pattern", f"in llama.cpp every layer {pattern} attends to all")


def _with_head_sizes(config: Fields) -> dict[str, GgufValue]:
    size = u32(config.positive("head_dim", 256))
    return _shared(config) | {"attention.key_length": size, "attention.value_length": size}


def _gemma2(config: Fields) -> Facts:
    _check_gemma(config, 2, 2)
    pairs = _with_head_sizes(config) | {
        "attn_logit_softcapping": f32(config.number("attn_logit_softcapping")),
        "final_logit_softcapping": f32(config.number("final_logit_softcapping")),
        "attention.sliding_window": u32(config.positive("sliding_window")),
    }
    return pairs, rotary(config, head_size(config), has_factors=False)


def _gemma3(config: Fields) -> Facts:
    _check_gemma(config, 3, 6)
    if config.has("attn_logit_softcapping"):
        raise config.refuse("attn_logit_softcapping", "llama.cpp caps no scores of attention in gemma3")
    pairs = _with_head_sizes(config) | {"attention.sliding_window": u32(config.positive("sliding_window"))}
    if config.has("final_logit_softcapping"):
        pairs["final_logit_softcapping"] = f32(config.number("final_logit_softcapping"))
    local = rope_fields(config, "sliding_attention")
    is_apart = local.path.endswith("sliding_attention.")
    base = local.number("rope_theta") if is_apart else config.number("rope_local_base_freq", 10000.0)
    return pairs | {"rope.freq_base_swa": f32(base)}, rotary(config, head_size(config), has_factors=False)


def _phi3(config: Fields) -> Facts:
    _check_activation(config, "silu")
    rope = rope_fields(config)
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    size = int(share * config.positive("hidden_size")) // config.positive("num_attention_heads")
    before = rope.positive(
        "original_max_position_embeddings",
        config.positive("original_max_position_embeddings", config.positive("max_position_embeddings")),
    )
    pairs = _shared(config) | {
        "rope.dimension_count": u32(size),
        "rope.scaling.original_context_length": u32(before),
        # Without a window it must say so: left out, llama.cpp takes that of Phi-3.
        "attention.sliding_window": u32(config.whole("sliding_window", 0)),
    }
    return pairs, long_rotary(config, size, before)


_NO_WINDOW = (
    "the model attends to the last {} tokens, and in llama.cpp, which knows no such window for it, to all: texts that"
    " are longer are computed otherwise"
)
_BY_ARCHITECTURE: Mapping[str, Callable[[Fields], Facts]] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": _qwen,
        "qwen3": _qwen,
        "qwen3moe": _qwen3moe,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "phi3": _phi3,
        "gpt-oss": _gpt_oss,
    }
)


def hyperparameters(architecture: str, config: Fields, vocabulary: int) -> Rotary:
    """Pairs with their whole keys, and tensors that stand beside the weights.

    Raises CheckpointError for fields that are missing, UnsupportedError for what llama.cpp does not compute.
    """
    pairs, found = _BY_ARCHITECTURE[architecture](config)
    together = {**pairs, **found.pairs, "vocab_size": u32(vocabulary)}
    notes = found.notes
    if architecture == "llama" and config.has("sliding_window"):
        notes = (*notes, _NO_WINDOW.format(config.positive("sliding_window")))
    return Rotary({f"{architecture}.{key}": value for key, value in together.items()}, found.tensors, notes)
