"""MiSS: W + Mᵀ repeated along the inputs (Kang and Yin 2024, arXiv 2409.15371), as `peft/tuners/miss/layer.py` has it,
and Bone, as PEFT 0.14 to 0.17 called it:

    plain    W[p, j] + M[j mod r, p]                 M [r, out]
    mini     W[p, j] + M[j mod r, p mod m]           M [r, m]
    bat      W + W diag(D) + D, block by block       D [out/r, r, r]

Of bat, a block of W [r, r] in the a-th r outputs has D[a] for its own, whichever inputs it is of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, AdapterConfig, Neutral, Rule
from streamconv.adapters.method import Method
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>miss_block|bone_block)")
# Columns of a product at a time: a cell's memory has no room for two of its size.
_STRETCH = 4096


class Kind(StrEnum):
    """Arrangement of the trained numbers, as `init_weights` says."""

    PLAIN = "plain"
    MINI = "mini"
    BAT = "bat"


@dataclass(frozen=True, slots=True)
class ShardUpdate(ByRows):
    """Part `block` [r, out], or of the kind mini [r, m]; W is [out, in]."""

    parameter: str
    parts: Mapping[str, StoredTensor]

    @property
    def low_rank(self) -> int:
        return self.parts["block"].shape[0]

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus the block's columns of its rows, for every r of its own columns, in place."""
        block = prepared["block"]
        rank, width = block.shape
        added = block[:, torch.arange(rows.start, rows.stop, device=cell.device) % width].T
        whole = cell.shape[1] // rank * rank
        cell[:, :whole].view(len(rows), -1, rank).add_(added.unsqueeze(1))
        cell[:, whole:] += added[:, : cell.shape[1] - whole]
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return has_zero_part(self.parts.values(), constants)


@dataclass(frozen=True, slots=True)
class BlockwiseUpdate(ByRows):
    """Part `block` [out/r, r, r]; W is [out, in], out and in whole numbers of r."""

    parameter: str
    parts: Mapping[str, StoredTensor]

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its blocks' products and blocks, in place."""
        blocks = prepared["block"]
        rank = blocks.shape[-1]
        step = max(1, _STRETCH // rank)
        for number in range(rows.start // rank, (rows.stop - 1) // rank + 1):
            first, last = max(rows.start, number * rank), min(rows.stop, (number + 1) * rank)
            own = cell[first - rows.start : last - rows.start].view(last - first, -1, rank)
            added = blocks[number, first - number * rank : last - number * rank].unsqueeze(1)
            for start in range(0, own.shape[1], step):
                some = own[:, start : start + step]
                some.add_(some @ blocks[number]).add_(added)
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return has_zero_part(self.parts.values(), constants)


# -- reading -------------------------------------------------------------------------------------------------------


def read_miss(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a MISS or BONE adapter. Raises AdapterError where tensors do not fit base or config."""
    kind, rank = _kind(source.config), source.config.rank("r")
    mini = source.config.rank("mini_r") if kind is Kind.MINI else None
    modules = by_module(source, _KEY).items()
    return tuple(
        _update(module, tensor, kind, rank, mini, source, base)
        for module, parts in modules
        for tensor in parts.values()
    )


def _kind(config: AdapterConfig) -> Kind:
    match config.fields.get("init_weights", True):
        case "bat":
            return Kind.BAT
        case "mini":
            return Kind.MINI
        case _:
            return Kind.PLAIN


def _update(
    module: str,
    tensor: StoredTensor,
    kind: Kind,
    rank: int,
    mini: int | None,
    source: Source,
    base: BaseParameters,
) -> Update:
    parameter = base.get(f"{module}.weight", tensor.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    expected = _expected(shape, kind, rank, mini) if len(shape) == 2 else None
    if tensor.shape != expected:
        raise AdapterError(
            f"{tensor.name} has shape {list(tensor.shape)}, which does not fit {parameter.name} of the base,"
            f" {list(parameter.shape)}{f'; expected {list(expected)}' if expected else ''}, as r, mini_r and"
            f" init_weights in {source.config.name} have it; was the adapter trained on this base?"
        )
    made = BlockwiseUpdate if kind is Kind.BAT else ShardUpdate
    return made(parameter.name, MappingProxyType({"block": tensor}))


def _expected(shape: Shape, kind: Kind, rank: int, mini: int | None) -> Shape | None:
    """The shape of the trained tensor of a weight [out, in]; None where none is possible."""
    outputs, inputs = shape
    if kind is Kind.BAT:
        return (outputs // rank, rank, rank) if outputs % rank == 0 and inputs % rank == 0 else None
    if mini is not None:
        return (rank, mini) if outputs % mini == 0 and rank <= inputs else None
    return (rank, outputs) if rank <= inputs else None


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del tensors
    variant = fields.get("init_weights")
    return {"rank": fields.get("r"), "variant": variant if isinstance(variant, str) else Kind.PLAIN.value}


# Of either name, as adapters are given the newer one by hand.
_FIELDS: Mapping[str, Rule] = MappingProxyType(
    {
        **COMMON_FIELDS,
        "r": USED,
        "mini_r": USED,
        "init_weights": Neutral(
            "an arrangement of the trained numbers that is not known here", (True, "bat", "mini")
        ),
        "bias": Neutral(
            "expected none, all, MiSS_only or Bone_only", ("none", "all", "MiSS_only", "Bone_only")
        ),
        "miss_dropout": NO_EFFECT,
    }
)
_KEYS = r"(?:miss|bone)_\w+"

_FORMULA = "W + M repeated along the inputs; bat: W + W D + D, block by block"

MISS = Method("MiSS", read_miss, _FIELDS, _KEYS, "zero (all miss_block)", _FORMULA, facts=_facts)
BONE = Method("Bone", read_miss, _FIELDS, _KEYS, "zero (all bone_block)", _FORMULA, facts=_facts)
