"""Gemma: Llama's layer, with norms that multiply by 1 + w; from the second on also norms of what the blocks return."""

from __future__ import annotations

from streamconv.equalization.base import Family, Producer
from streamconv.equalization.llama import gated

_KIND = Producer.NORM_OF_ONE_MORE

GEMMA = Family(
    pairs=gated("input_layernorm", "post_attention_layernorm", _KIND),
    others=("self_attn.rotary_emb",),
)
GEMMA2 = Family(
    pairs=gated("input_layernorm", "pre_feedforward_layernorm", _KIND),
    others=("post_attention_layernorm", "post_feedforward_layernorm"),
)
GEMMA3 = Family(pairs=GEMMA2.pairs, others=(*GEMMA2.others, "self_attn.q_norm", "self_attn.k_norm"))
