"""Choice of ggml's types for the tensors of a GGUF file, as llama.cpp's `llama-quantize` makes it.

A mix such as q4_k_m has one type for most tensors, and more bits for those that suffer most from few: values and the
last projection of feed-forward nets in the first and the last eighth of the layers and every third between, and the
output. What a row is too short for gets a type with shorter blocks.

Source: llama.cpp `src/llama-quant.cpp` (llama-cpp-python 0.3.36), `llama_tensor_get_type`, for all architectures but
Falcon and GLM5-next, which have rules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streamconv.kernels.ggml import BLOCK_TYPES


@dataclass(frozen=True, slots=True)
class Mix:
    """Types of a file: `base`; `more`, of values and last projections in layers that `_has_more_bits`; `first`, of the
    first four values and of last projections in the first eighth; `output`, of attention's output next to 8 experts.

    `file_type` is the number that GGUF's `general.file_type` gives.
    """

    name: str
    base: str
    file_type: int
    more: str | None = None
    first: str | None = None
    output: str | None = None


_ALL = (
    Mix("f32", "f32", 0),
    Mix("f16", "f16", 1),
    Mix("bf16", "bf16", 32),
    Mix("q4_0", "q4_0", 2),
    Mix("q4_1", "q4_1", 3),
    Mix("q5_0", "q5_0", 8),
    Mix("q5_1", "q5_1", 9),
    Mix("q8_0", "q8_0", 7),
    Mix("q4_k_s", "q4_k", 14, first="q5_k", output="q5_k"),
    Mix("q4_k_m", "q4_k", 15, more="q6_k", output="q5_k"),
    Mix("q5_k_s", "q5_k", 16),
    Mix("q5_k_m", "q5_k", 17, more="q6_k"),
    Mix("q6_k", "q6_k", 18),
)
MIXES: Mapping[str, Mix] = {mix.name: mix for mix in _ALL}

# A type whose rows are whole super-blocks -> one with shorter blocks, for rows that are not.
_SHORTER = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
}
# Next to importance, the first last projections of these get an offset.
_WITH_OFFSET = {"q4_0": "q4_1", "q5_0": "q5_1"}
# Models of 80 layers in which several heads share values, which get more bits as there are few: those called 70B.
_SHARING = {"llama": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
_KEYS, _ATTENTION_OUTPUT, _DOWN = "attn_k.weight", "attn_output.weight", "ffn_down"
_LAYER = re.compile(r"blk\.(\d+)\.")

# Parts of names of weights that are small, or that a model is sensitive to: they keep the type they have.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel"),
    *("per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight"),
    *(
        "indexer.k_proj.weight",
        "indexer.q_proj.weight",
        "time_mix_first.weight",
        "time_mix_lerp_fused.weight",
    ),
    *(
        f"time_mix_{part}.weight"
        for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", ".position_embd", "sam.pos_embd", "sam.neck."),
    *("sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True, slots=True)
class MixedModel:
    """Facts of a model that types depend on.

    `layers` is its block count; `experts` those of a layer, 0 without. `values` and `downs` are the layers that have
    values, and a last projection of the feed-forward net, in rising order. `is_tied`: there is no output.weight.
    `shares_values`: see `_SHARING`.
    """

    layers: int
    experts: int
    values: tuple[int, ...]
    downs: tuple[int, ...]
    is_tied: bool
    shares_values: bool

    @classmethod
    def of(
        cls, names: Iterable[str], architecture: str, layers: int, experts: int, heads: int, key_heads: int
    ) -> MixedModel:
        """The model with tensors of these names; `architecture` as GGUF calls it."""
        known = list(names)
        is_large = _SHARING.get(architecture) == layers and not experts
        return cls(
            layers=layers,
            experts=experts,
            values=_layers_with(known, _VALUES),
            downs=_layers_with(known, (f"{_DOWN}.weight",)),
            is_tied=_OUTPUT not in known,
            shares_values=is_large and (architecture != "llama" or heads != key_heads),
        )


def _layers_with(names: Iterable[str], parts: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(_layer_of(name) for name in names if any(part in name for part in parts)))


def _layer_of(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def is_quantized(tensor: str, dimensions: int) -> bool:
    """Whether a tensor gets the mix's types at all: GGUF's name, and how many axes it has."""
    if dimensions < 2 or not tensor.endswith("weight") or tensor in _KEPT_WHOLE:
        return False
    return not any(part in tensor for part in _KEPT)


def fitting_type(name: str, columns: int) -> str:
    """The type itself if rows of `columns` are whole super-blocks of it, else one with shorter blocks, or f16."""
    for candidate in (name, _SHORTER.get(name, name)):
        if columns % BLOCK_TYPES[candidate].super_block == 0:
            return candidate
    return "f16"


def mixed_type(mix: Mix, tensor: str, columns: int, model: MixedModel, has_importance: bool = False) -> str:
    """Type of a tensor that `is_quantized`, from its name in GGUF and the length of its rows."""
    if mix.base in ("f32", "f16", "bf16"):
        return mix.base
    return fitting_type(_wished(mix, tensor, columns, model, has_importance), columns)


def _wished(mix: Mix, tensor: str, columns: int, model: MixedModel, has_importance: bool) -> str:
    if tensor == _OUTPUT or (model.is_tied and tensor in _EMBEDDINGS):
        is_whole = columns % BLOCK_TYPES[mix.base].super_block == 0
        return "q6_k" if is_whole and mix.base != "q8_0" else "q8_0"
    if any(part in tensor for part in _VALUES):
        return _type_of_values(mix, model.values.index(_layer_of(tensor)), model)
    if _DOWN in tensor:
        return _type_of_down(mix, tensor, model, has_importance)
    if model.experts == 8 and _KEYS in tensor:
        return "q8_0"
    is_output = model.experts == 8 and _ATTENTION_OUTPUT in tensor
    return mix.output if is_output and mix.output else mix.base


def _type_of_values(mix: Mix, place: int, model: MixedModel) -> str:
    if model.experts == 8:
        return "q8_0"
    if mix.more and _has_more_bits(place, len(model.values)):
        return mix.more
    if mix.first and place < 4:
        return mix.first
    return "q5_k" if model.shares_values and mix.base == "q4_k" else mix.base


def _type_of_down(mix: Mix, tensor: str, model: MixedModel, has_importance: bool) -> str:
    layer = _layer_of(tensor)
    place = layer if model.experts > 1 else model.downs.index(layer)
    if mix.more and _has_more_bits(place, model.layers):
        return mix.more
    is_first = place < model.layers // 8
    if mix.first and is_first:
        return mix.first
    return _WITH_OFFSET.get(mix.base, mix.base) if has_importance and is_first else mix.base


def _has_more_bits(place: int, count: int) -> bool:
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2
