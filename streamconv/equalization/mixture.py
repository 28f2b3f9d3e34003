"""Mixtures of experts: what the norm before them makes, the router and all experts read alone."""

from __future__ import annotations

from streamconv.equalization.base import LayerForm, Pair, Producer
from streamconv.equalization.llama import LLAMA, QUERIES_AND_KEYS, QWEN3, attention

_ROTARY = "self_attn.rotary_emb"


def mixture(
    norm: str, router: str, experts: str, parts: tuple[str, str, str], beside: str = ""
) -> tuple[Pair, ...]:
    """The pairs of experts after a norm; `parts` are what gate, up and down are called in each, `beside` is the path of
    an expert to which all tokens come.
    """
    gate, up, down = parts
    always = (beside,) if beside else ()
    readers = (router, *(f"{path}.{part}" for path in (f"{experts}.*", *always) for part in (gate, up)))
    return (
        Pair(norm, readers, Producer.NORM),
        *(Pair(f"{path}.{up}", (f"{path}.{down}",), Producer.ROWS) for path in (f"{experts}.*", *always)),
    )


_PARTS = ("gate_proj", "up_proj", "down_proj")
_BEFORE = "post_attention_layernorm"
_ATTENTION = attention("input_layernorm")

MIXTRAL = (
    LayerForm(
        (
            *_ATTENTION,
            *mixture(_BEFORE, "block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2")),
        ),
        (_ROTARY,),
    ),
    # As transformers 5 calls the same.
    LayerForm((*_ATTENTION, *mixture(_BEFORE, "mlp.gate", "mlp.experts", _PARTS)), (_ROTARY,)),
)


def _with_own_gate(pairs: tuple[Pair, ...], gate: str) -> tuple[Pair, ...]:
    """`pairs` where the norm is read by one more, which weighs the expert to whom all tokens come."""
    return tuple(
        Pair(pair.producer, (*pair.consumers, gate), pair.kind) if pair.producer == _BEFORE else pair
        for pair in pairs
    )


_QWEN2 = _with_own_gate(
    mixture(_BEFORE, "mlp.gate", "mlp.experts", _PARTS, "mlp.shared_expert"), "mlp.shared_expert_gate"
)
QWEN2_MOE = (LayerForm((*_ATTENTION, *_QWEN2), (_ROTARY,)), *LLAMA)

_NORMED = (_ROTARY, *QUERIES_AND_KEYS)
QWEN3_MOE = (LayerForm((*_ATTENTION, *mixture(_BEFORE, "mlp.gate", "mlp.experts", _PARTS)), _NORMED), *QWEN3)
OLMOE = (QWEN3_MOE[0],)

GLM4_MOE = (
    LayerForm(
        (*_ATTENTION, *mixture(_BEFORE, "mlp.gate", "mlp.experts", _PARTS, "mlp.shared_experts")),
        _NORMED,
    ),
    *QWEN3,
)
