"""Parameters that another class of the model has, found inside those that the base stores.

Classes of one model differ in what they fuse: transformers 5 holds all experts of a layer in one parameter where files
and transformers 4 have a matrix for each, Phi-3 has one `qkv_proj` where its Llama form has `q_proj`, `k_proj` and
`v_proj`. A parameter of the other class is then rows or columns of a stored one, or several stored ones, one below the
other. Which, follows from names, shapes and config.json alone, so nothing is looked up before a key asks for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Parameter
from streamconv.checkpoint.types import Shape

Stored = Mapping[str, Parameter]
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Cells of a stored matrix, in `rows` and `columns`, that are rows of another parameter from `first` on.

    The matrix has all axes of the stored parameter but the last as its rows.
    """

    stored: Parameter
    rows: range
    columns: range
    first: int = 0


@dataclass(frozen=True, slots=True)
class ParameterView:
    """A parameter of another class of the model, in pieces of stored ones."""

    parameter: Parameter
    pieces: tuple[Piece, ...]


def find_stored(name: str, stored: Stored) -> Parameter | None:
    """The stored parameter that is `name`, or that another class calls so; None if none is."""
    return next((stored[each] for each in spellings(name) if each in stored), None)


def find_view(name: str, stored: Stored, config: Config) -> ParameterView | None:
    """Find `name` as part of a stored parameter, or as made of several; None if it is neither."""
    return _of_expert(name, stored, config) or _split(name, stored, config) or _joined(name, stored)


def names_at(path: str) -> Iterator[str]:
    """Names of parameters, one of which there must be where `path` is a module or a parameter."""
    parent, _, last = path.rpartition(".")
    yield from (path, f"{path}.weight")
    # The module of fused experts; and Tinker's of one projection of all experts.
    yield from (f"{path}.{fused}" for fused in _FUSED)
    if last in _ROLES:
        yield f"{parent}.0.{last}.weight"


def is_unembedding(name: str) -> bool:
    """Whether it is the head's weight in the names of Tinker."""
    return _HEAD.fullmatch(name) is not None and name.endswith(".weight")


def names_of_parameter(name: str) -> Iterator[str]:
    """Names that a stored parameter, or the fused one that it is a part of, may have in classes of the model."""
    yield from spellings(name)
    match = _APART.fullmatch(name)
    role = _ROLES.get(match["part"] or "", "") if match is not None else ""
    if match is not None and role:
        for whole in ("down_proj",) if role == "down" else ("gate_up_proj", f"{role}_proj"):
            yield from spellings(f"{match['place']}.{whole}")


def other_names(parameter: Parameter) -> Iterator[str]:
    """Names that other classes may have for parts of a stored parameter, or for what it is part of.

    Not each need be in a class, nor in the base: `find_view` tells.
    """
    parent, _, last = parameter.name.rpartition(".")
    if len(parameter.shape) == 3:
        places = dict.fromkeys(each.rpartition(".")[0] for each in spellings(parameter.name))
        for number in range(parameter.shape[0]):
            for place in places:
                yield from (f"{place}.{number}.{part}.weight" for part in _ROLES)
                yield from (f"{place}.{part}s.{number}.weight" for part in _FUSED)
    place, _, part = parent.rpartition(".")
    for whole, parts in _JOINED:
        if part == whole:
            yield from (f"{place}.{each}.{last}" for each in parts)
        elif part in parts:
            yield f"{place}.{whole}.{last}"


def other_form(name: str, stored: Stored) -> str | None:
    """The stored parameter near `name` that may hold it, in a form that is not known; None if there is none."""
    module, _, kind = name.rpartition(".")
    parent, _, part = module.rpartition(".")
    near = [f"{parent}.{whole}.{kind}" for whole, parts in _JOINED if part in parts]
    near += [f"{parent}.{each}.{kind}" for whole, parts in _JOINED if part == whole for each in parts]
    if part in _QUERIES_ETC:
        near += [f"{parent}.{whole}.{kind}" for whole in _MIXED_NAMES]
    match = _APART.fullmatch(name)
    if match is not None:
        near += [f"{match['place']}.{each}" for each in _FUSED]
    return next((found.name for each in near if (found := find_stored(each, stored)) is not None), None)


# -- names of one parameter ----------------------------------------------------------------------------------------

# Pairs of what classes call the same thing: those of transformers 5 first, then files, or older classes. Mixtral and
# kin, PhiMoE, Granite MoE, Aria.
_SAME = (
    (".mlp.router.weight", ".block_sparse_moe.gate.weight"),
    (".mlp.", ".block_sparse_moe."),
    (".router.weight", ".router.layer.weight"),
    (".experts.gate_up_proj", ".input_linear.weight"),
    (".experts.down_proj", ".output_linear.weight"),
    (".experts.gate_up_proj", ".experts.fc1.weight"),
    (".experts.down_proj", ".experts.fc2.weight"),
)
_PART_OF_EXPERT = re.compile(r"(?P<before>.+\.experts\.\d+\.)(?P<part>\w+)(?P<after>\.weight|\.bias)")
_SAME_PARTS: Mapping[str, str] = MappingProxyType(
    {
        one: other
        for pair in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        for one, other in (pair, pair[::-1])
    }
)
# Tinker's name of the head.
_HEAD = re.compile(r"(.*\.)?unembed_tokens\.(?P<kind>weight|bias)")


def spellings(name: str) -> Iterator[str]:
    """Names for the same: `name` first, then with a pair of _SAME swapped, then with an expert's part swapped, too."""
    names = [name]
    for pair in _SAME:
        for one, other in (pair, pair[::-1]):
            if one in name and (one.endswith(".") or name.endswith(one)):
                names.append(name.replace(one, other, 1))
    yield from names
    for each in names:
        match = _PART_OF_EXPERT.fullmatch(each)
        if match is not None and match["part"] in _SAME_PARTS:
            yield f"{match['before']}{_SAME_PARTS[match['part']]}{match['after']}"
    match = _HEAD.fullmatch(name)
    if match is not None:
        yield from (f"{prefix}lm_head.{match['kind']}" for prefix in ("", "language_model.", "model."))


# -- one expert of a fused parameter -------------------------------------------------------------------------------

# Parts of an expert, and what they are of: the weights that a gated unit multiplies, and the way back.
_ROLES: Mapping[str, str] = MappingProxyType(
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
)
_FUSED = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")
_APART = re.compile(
    r"(?P<place>.+)\.(?:(?P<number>0|[1-9]\d{0,5})\.(?P<part>\w+)|(?P<parts>\w+)s\.(?P<index>0|[1-9]\d{0,5}))"
    r"\.(?P<kind>weight|bias)"
)
# Models that store experts as [in, out], where shapes do not tell; the first have gate and up columns in turns.
_IN_TURNS = frozenset({"gpt_oss"})
_IN_OUT = _IN_TURNS | {
    "aria",
    "aria_text",
    "llama4",
    "llama4_text",
    "openai_privacy_filter",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
}


def _of_expert(name: str, stored: Stored, config: Config) -> ParameterView | None:
    """Part of one expert in a parameter [E, out, in] or [E, in, out], or in a bias [E, out]."""
    match = _APART.fullmatch(name)
    if match is None:
        return None
    number, part = int(match["number"] or match["index"]), match["part"] or match["parts"]
    suffix = "_bias" if match["kind"] == "bias" else ""
    role = _ROLES.get(part, "")
    wholes = (
        ("gate_up_proj", part) if role in ("gate", "up") else ("down_proj",) if role == "down" else (part,)
    )
    for whole in wholes:
        fused = find_stored(f"{match['place']}.{whole}{suffix}", stored)
        if fused is not None and number < (fused.shape or (0,))[0] and whole in _FUSED:
            share = role if whole == "gate_up_proj" and part != whole else None
            return _expert_view(name, fused, number, share, is_down=whole == "down_proj", config=config)
    return None


def _expert_view(
    name: str, fused: Parameter, number: int, share: str | None, is_down: bool, config: Config
) -> ParameterView | None:
    """All of expert `number`, or its `share` of gate and up."""
    is_bias = len(fused.shape) == 2 and name.endswith(".bias")
    in_out = None if is_bias else _is_in_out(fused.shape, is_down, config)
    if not is_bias and in_out is None:
        return None
    height, width = (1, fused.shape[1]) if is_bias else fused.shape[1:]
    rows, columns = range(number * height, (number + 1) * height), range(width)
    if is_bias or in_out:
        columns = _share(columns, share, config)
    else:
        rows = _share(rows, share, config)
    shape = (len(columns),) if is_bias else (len(rows), len(columns))
    parameter = Parameter(name, shape, fused.dtype, in_out)
    return ParameterView(parameter, (Piece(fused, rows, columns),))


def _share(outputs: range, share: str | None, config: Config) -> range:
    """Outputs of the gate, or of up, among those of both."""
    if share is None:
        return outputs
    half, second = len(outputs) // 2, share == "up"
    if _model_type(config) in _IN_TURNS:
        return outputs[int(second) :: 2]
    return outputs[half:] if second else outputs[:half]


def _is_in_out(shape: Shape, is_down: bool, config: Config) -> bool | None:
    """Whether experts are stored as [in, out]; None where a parameter of such a shape holds no experts.

    Shapes say, by the model's hidden size; where both axes have it, or it is not known, the model does.
    """
    if len(shape) != 3:
        return None
    hidden = {size for section in _sections(config) if (size := _size(section, "hidden_size"))}
    inputs_last, inputs_first = shape[2] in hidden, shape[1] in hidden
    if hidden and not inputs_last and not inputs_first:
        return None
    if inputs_last == inputs_first:
        return _model_type(config) in _IN_OUT
    return inputs_last if is_down else inputs_first


# -- projections that a class has apart, and another as one --------------------------------------------------------

# A fused matrix, and what it is made of, one below the other.
_JOINED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("W_pack", ("q_proj", "k_proj", "v_proj")),
    ("Wqkv", ("q_proj", "k_proj", "v_proj")),
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("in_proj_qkv", ("in_proj_q", "in_proj_k", "in_proj_v")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
)
_QUERIES_ETC = ("q_proj", "k_proj", "v_proj")
# Fused matrices in an order of their own, by heads or as columns: GPT-NeoX, Falcon and BLOOM; InternLM2; GPT-2.
_MIXED_NAMES = ("query_key_value", "wqkv", "c_attn")
# Models whose fused matrix has its parts in another order: head by head, or in shards.
_MIXED = frozenset({"codegen", "persimmon", "fuyu"})


def _split(name: str, stored: Stored, config: Config) -> ParameterView | None:
    """Rows of a fused matrix, or of its bias."""
    module, _, kind = name.rpartition(".")
    parent, _, part = module.rpartition(".")
    if _model_type(config) in _MIXED or kind not in ("weight", "bias"):
        return None
    for whole, parts in _JOINED:
        fused = stored.get(f"{parent}.{whole}.{kind}") if part in parts else None
        sizes = None if fused is None else _sizes(f"{parent}.{whole}", len(parts), stored, config)
        if fused is None or sizes is None or len(fused.shape) not in (1, 2):
            continue
        last = list(accumulate(sizes))[parts.index(part)]
        some = range(last - sizes[parts.index(part)], last)
        if fused.shape[:1] != (sum(sizes),) or not some:
            continue
        is_bias = len(fused.shape) == 1
        piece = Piece(fused, range(1), some) if is_bias else Piece(fused, some, range(fused.shape[1]))
        return ParameterView(Parameter(name, (len(some), *fused.shape[1:]), fused.dtype, False), (piece,))
    return None


def _sizes(place: str, count: int, stored: Stored, config: Config) -> Sequence[int] | None:
    """Rows of each part of the fused matrix at `place`, by the heads in config.json, or equal ones; None if unknown."""
    weight = stored.get(f"{place}.weight")
    if weight is None or not weight.shape:
        return None
    rows = weight.shape[0]
    if count == 2:
        return None if rows % 2 else (rows // 2, rows // 2)
    for section in _sections(config):
        sizes = _linear_heads(section) if place.endswith(".in_proj_qkv") else _heads(section)
        if sizes is not None and sum(sizes) == rows:
            return sizes
    is_square = rows == 3 * math.prod(weight.shape[1:])
    return (rows // 3, rows // 3, rows // 3) if is_square and not place.endswith(".in_proj_qkv") else None


def _heads(section: Config) -> tuple[int, int, int] | None:
    heads, hidden = _size(section, "num_attention_heads"), _size(section, "hidden_size")
    shared = _size(section, "num_key_value_heads") or heads
    size = _size(section, "head_dim") or (hidden // heads if heads else 0)
    return (heads * size, shared * size, shared * size) if heads and size else None


def _linear_heads(section: Config) -> tuple[int, int, int] | None:
    """Rows of queries, keys and values of a gated delta net (Qwen3.5)."""
    keys, values = (
        _size(section, f"linear_num_{each}_heads") * _size(section, f"linear_{each}_head_dim")
        for each in ("key", "value")
    )
    return (keys, keys, values) if keys and values else None


def _joined(name: str, stored: Stored) -> ParameterView | None:
    """Several stored matrices, or biases, one below the other."""
    module, _, kind = name.rpartition(".")
    parent, _, whole = module.rpartition(".")
    for fused, parts in _JOINED:
        if fused != whole or kind not in ("weight", "bias"):
            continue
        found = [stored.get(f"{parent}.{part}.{kind}") for part in parts]
        pieces = [part for part in found if part is not None]
        if len(pieces) < len(parts) or len({(len(part.shape), *part.shape[1:]) for part in pieces}) != 1:
            continue
        sizes = [part.shape[0] for part in pieces]
        shape = (sum(sizes), *pieces[0].shape[1:])
        if len(shape) > 2:
            continue
        firsts = accumulate(sizes, initial=0)
        return ParameterView(
            Parameter(name, shape, pieces[0].dtype, False),
            tuple(
                Piece(part, range(part.shape[0]), range(math.prod(part.shape[1:])), first)
                for part, first in zip(pieces, firsts, strict=False)
            ),
        )
    return None


# -- config.json -------------------------------------------------------------------------------------------------


def _sections(config: Config) -> Iterator[Config]:
    """config.json and the configs in it, of text, vision or audio."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield value


def _model_type(config: Config) -> str:
    return str(config.get("model_type"))


def _size(section: Config, field: str) -> int:
    """A positive whole number of a config; 0 where it is none, such as a list with one for each layer."""
    value = section.get(field)
    return value if type(value) is int and value > 0 else 0
