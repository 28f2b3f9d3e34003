"""Names of a model's weights in transformers' checkpoints and in GGUF files, both ways.

Those of llama.cpp stand in `TensorNameMap` of gguf-py (`tensor_mapping.py`), those of transformers in its models. `{b}`
is the number of a block, `{e}` that of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
_BLOCK, _LAYER = "blk.{b}.", "model.layers.{b}."

Modules = Mapping[str, str]
"""Modules in transformers' checkpoints and in GGUF files, without the suffix `.weight` or `.bias`."""

ENDS: Modules = MappingProxyType(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
)


def _in_blocks(modules: Modules) -> Modules:
    return MappingProxyType({_LAYER + ours: _BLOCK + theirs for ours, theirs in modules.items()})


ATTENTION = _in_blocks(
    {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
)
NORMS_OF_HEADS = _in_blocks({"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"})
MLP = _in_blocks({f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")})
NORMS = _in_blocks({"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"})
# Gemma has norms behind attention and MLP, too; the one that others call post_attention is before the MLP.
FOUR_NORMS = _in_blocks(
    {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
FUSED = _in_blocks(
    {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
)
# gpt-oss, whose weights are taken apart first (`pieces.py`).
GPT_OSS = _in_blocks(
    {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.sinks": "attn_sinks",
        "mlp.router": "ffn_gate_inp",
    }
    | {f"mlp.experts.{{e}}.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}
    | {f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}
)
EXPERTS = _in_blocks(
    {f"mlp.experts.{{e}}.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}
    | {"mlp.gate": "ffn_gate_inp"}
)


@dataclass(frozen=True, slots=True)
class GgufName:
    """Name of a tensor, and which of those stacked in it a weight is."""

    name: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class NameTable:
    """Modules of one architecture; names that are not in it are none of its weights."""

    modules: Modules

    def gguf_name(self, name: str) -> GgufName | None:
        """Name in a GGUF file of the weight that transformers calls `name`."""
        module, _, suffix = name.rpartition(".")
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", module)
        pattern = re.sub(r"\.(layers|experts)\.\d+(?=\.|$)", _numbered, module)
        found = self.modules.get(pattern)
        if found is None or suffix not in ("weight", "bias"):
            return None
        expert = int(numbers[1]) if "{e}" in pattern else None
        return GgufName(f"{found.format(b=numbers[0] if numbers else None)}.{suffix}", expert)

    def name_of(self, name: str, expert: int | None = None) -> str | None:
        """Name in transformers' checkpoints of a GGUF tensor, or of one expert in it."""
        module, _, suffix = name.rpartition(".")
        pattern = re.sub(r"^blk\.(\d+)", "blk.{b}", module)
        number = re.match(r"blk\.(\d+)\.", module)
        for ours, theirs in self.modules.items():
            if theirs == pattern and ("{e}" in ours) == (expert is not None) and suffix in ("weight", "bias"):
                return f"{ours.format(b=number and number[1], e=expert)}.{suffix}"
        return None


def _numbered(match: re.Match[str]) -> str:
    return f".{match[1]}.{{{'b' if match[1] == 'layers' else 'e'}}}"
