"""Architectures that are written as GGUF: how llama.cpp calls, orders and changes their weights.

Facts are those of llama.cpp's own converter (`conversion/*.py`) and of its loaders (`src/models/*.cpp`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from streamconv.gguf import names
from streamconv.gguf.names import NameTable


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture as llama.cpp knows it. `classes` are transformers' that are written as it.

    `permutes`: rows of q and k stand in the order in which llama.cpp rotates them. `norm_shift` is added to norms.
    `has_head`: whether the output head may be a tensor of its own. `biases`: GGUF's modules that may have one.
    """

    name: str
    classes: tuple[str, ...]
    table: NameTable
    permutes: bool = False
    norm_shift: float = 0.0
    has_head: bool = True
    biases: frozenset[str] = frozenset()


def _table(*modules: names.Modules) -> NameTable:
    together: dict[str, str] = {}
    for each in (names.ENDS, *modules):
        together |= each
    return NameTable(MappingProxyType(together))


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_OTHERS = frozenset({"attn_output", "ffn_gate", "ffn_up", "ffn_down"})
_LLAMA = _table(names.ATTENTION, names.MLP, names.NORMS)
_QWEN3 = _table(names.ATTENTION, names.NORMS_OF_HEADS, names.MLP, names.NORMS)
_ALL = (
    Architecture(
        "llama", ("LlamaForCausalLM", "MistralForCausalLM"), _LLAMA, permutes=True, biases=_QKV | _OTHERS
    ),
    Architecture("qwen2", ("Qwen2ForCausalLM",), _LLAMA, biases=_QKV),
    Architecture("qwen3", ("Qwen3ForCausalLM",), _QWEN3),
    Architecture(
        "qwen3moe",
        ("Qwen3MoeForCausalLM",),
        _table(names.ATTENTION, names.NORMS_OF_HEADS, names.EXPERTS, names.NORMS),
    ),
    Architecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        _table(names.ATTENTION, names.MLP, names.FOUR_NORMS),
        norm_shift=1.0,
        has_head=False,
    ),
    Architecture(
        "gemma3",
        ("Gemma3ForCausalLM",),
        _table(names.ATTENTION, names.NORMS_OF_HEADS, names.MLP, names.FOUR_NORMS),
        norm_shift=1.0,
    ),
    Architecture(
        "gpt-oss",
        ("GptOssForCausalLM",),
        _table(names.ATTENTION, names.GPT_OSS),
        biases=_QKV | {"attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"},
    ),
    Architecture("phi3", ("Phi3ForCausalLM",), _table(names.FUSED, names.NORMS)),
)
# By the class that a config names.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {each: one for one in _ALL for each in one.classes}
)
