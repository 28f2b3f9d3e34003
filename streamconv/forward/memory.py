"""Memory of a layer that computes some sequences, from config and headers alone."""

from __future__ import annotations

from streamconv.forward.walk import Walk

# Libraries loaded late, thread stacks, headers, tile buffers, and what the allocator keeps of freed memory.
FIXED_BYTES = 128 * 2**20
# Tokens computed at a time: with more, matrix products get no faster on a CPU.
BATCH_TOKENS = 2048
# Float32 numbers a token that a layer has at once, in multiples of its widths.
_WIDTHS_ALIVE = 6


def table_bytes(walk: Walk, tokens: int) -> int:
    """Rows of the embedding that a text of so many tokens can use."""
    return min(tokens, walk.vocabulary) * walk.hidden * walk.dtype.itemsize


def sequence_bytes(walk: Walk, length: int) -> int:
    """Bytes of a layer for one sequence, about: its inner states, attention scores, and masks of both kinds."""
    config = walk.skeleton.text_config
    inner = max(getattr(config, name, None) or 0 for name in ("intermediate_size", "n_inner", "ffn_dim"))
    inner = inner or 4 * walk.hidden
    experts = getattr(config, "num_experts_per_tok", None) or 1
    heads = getattr(config, "num_attention_heads", 1)
    widths = _WIDTHS_ALIVE * (walk.hidden + experts * inner)
    return 4 * length * (widths + 2 * heads * length)
