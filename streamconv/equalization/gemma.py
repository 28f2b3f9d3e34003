"""Gemma: Llama's layer, with norms that multiply by 1 + w; from the second on also norms of what the blocks return."""

from __future__ import annotations

from streamconv.equalization.base import LayerForm, Producer
from streamconv.equalization.llama import QUERIES_AND_KEYS, gated

_KIND = Producer.NORM_OF_ONE_MORE
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")

GEMMA = (
    LayerForm(
        gated("input_layernorm", "post_attention_layernorm", _KIND),
        ("self_attn.rotary_emb",),
    ),
)
GEMMA2 = (LayerForm(gated("input_layernorm", "pre_feedforward_layernorm", _KIND), _AFTER),)
GEMMA3 = (LayerForm(GEMMA2[0].pairs, (*_AFTER, *QUERIES_AND_KEYS)),)
