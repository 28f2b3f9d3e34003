"""Hyperparameters of a config.json as pairs of a GGUF header (`docs/gguf.md` of ggml, `llama-arch.cpp`).

What llama.cpp computes in one way only, whatever the file says, is looked at here: where a config wants another, the
model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from streamconv.checkpoint.gguf_header import GgufValue, f32, u32
from streamconv.gguf.fields import Fields
from streamconv.gguf.rope import Rotary, rotary

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
    return _shared(config), rotary(config, head_size(config), has_factors=False)


_BY_ARCHITECTURE: Mapping[str, Callable[[Fields], Facts]] = MappingProxyType(
    {"llama": _llama, "qwen2": _qwen, "qwen3": _qwen}
)


def hyperparameters(architecture: str, config: Fields, vocabulary: int) -> Rotary:
    """Pairs with their whole keys, and tensors that stand beside the weights.

    Raises CheckpointError for fields that are missing, UnsupportedError for what llama.cpp does not compute.
    """
    pairs, found = _BY_ARCHITECTURE[architecture](config)
    together = {**pairs, **found.pairs, "vocab_size": u32(vocabulary)}
    return Rotary({f"{architecture}.{key}": value for key, value in together.items()}, found.tensors)
