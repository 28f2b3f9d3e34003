"""Llama and what is built like it: two norms, attention whose values go to o_proj, a gated MLP."""

from __future__ import annotations

from streamconv.equalization.base import LayerForm, Outputs, Pair, Producer

QUERIES_AND_KEYS = ("self_attn.q_norm", "self_attn.k_norm")
_ROTARY = ("self_attn.rotary_emb",)


def attention(norm: str, kind: Producer = Producer.NORM) -> tuple[Pair, ...]:
    """The pairs of attention after a norm."""
    return (
        Pair(norm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), kind),
        Pair("self_attn.v_proj", ("self_attn.o_proj",), Producer.VALUES),
    )


def gated(attention_norm: str, mlp_norm: str, kind: Producer) -> tuple[Pair, ...]:
    """The pairs of a layer with these norms before attention and MLP."""
    return (
        *attention(attention_norm, kind),
        Pair(mlp_norm, ("mlp.gate_proj", "mlp.up_proj"), kind),
        # act(gate) · up: what up is divided by, the product is.
        Pair("mlp.up_proj", ("mlp.down_proj",), Producer.ROWS),
    )


def fused_gated(mlp_norm: str) -> tuple[Pair, ...]:
    """The pairs of an MLP with gate and up in one matrix, after a norm."""
    return (
        Pair(mlp_norm, ("mlp.gate_up_proj",), Producer.NORM),
        Pair("mlp.gate_up_proj", ("mlp.down_proj",), Producer.ROWS, Outputs.SECOND_HALF),
    )


_LLAMA = LayerForm(
    gated("input_layernorm", "post_attention_layernorm", Producer.NORM),
    _ROTARY,
)
LLAMA = (_LLAMA,)

# Norms of queries and keys come after the projections, which keep their outputs.
QWEN3 = (LayerForm(_LLAMA.pairs, (*_ROTARY, *QUERIES_AND_KEYS)),)

PHI3 = (
    LayerForm(
        (
            Pair("input_layernorm", ("self_attn.qkv_proj",), Producer.NORM),
            Pair("self_attn.qkv_proj", ("self_attn.o_proj",), Producer.VALUES, Outputs.VALUES),
            *fused_gated("post_attention_layernorm"),
        ),
        _ROTARY,
    ),
)

# GLM-4 has norms of what the blocks return, too.
GLM4 = (
    LayerForm(
        (*attention("input_layernorm"), *fused_gated("post_attention_layernorm")),
        (*_ROTARY, "post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
)
