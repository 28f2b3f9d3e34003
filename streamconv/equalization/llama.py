"""Llama and what is built like it: two norms, attention whose values go to o_proj, a gated MLP."""

from __future__ import annotations

from streamconv.equalization.base import Family, Pair, Producer


def gated(attention_norm: str, mlp_norm: str, kind: Producer) -> tuple[Pair, ...]:
    """The pairs of a layer with these norms before attention and MLP."""
    return (
        Pair(attention_norm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), kind),
        Pair("self_attn.v_proj", ("self_attn.o_proj",), Producer.VALUES),
        Pair(mlp_norm, ("mlp.gate_proj", "mlp.up_proj"), kind),
        # act(gate) · up: what up is divided by, the product is.
        Pair("mlp.up_proj", ("mlp.down_proj",), Producer.ROWS),
    )


LLAMA = Family(
    pairs=gated("input_layernorm", "post_attention_layernorm", Producer.NORM),
    others=("self_attn.rotary_emb",),
)

# Norms of queries and keys come after the projections, which keep their outputs.
QWEN3 = Family(pairs=LLAMA.pairs, others=(*LLAMA.others, "self_attn.q_norm", "self_attn.k_norm"))
