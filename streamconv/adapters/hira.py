"""HiRA: W ∘ (1 + B A), a Hadamard product with the weight itself (Huang et al. 2025, ICLR), as
`peft/tuners/hira/layer.py` has it; `Conv1D` and embeddings by (B A)ᵀ, convolutions by Σ B[o, r] A[r, i, *kernel].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED
from streamconv.adapters.lora import factor_rows
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.ranks import Ranks, rank_patterns
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.hira_(?P<role>(embedding_)?[AB])")
# Columns of the product at a time: a cell's memory has no room for one of its size.
_STRETCH = 4096


@dataclass(frozen=True, slots=True)
class HiraUpdate(ByRows):
    """Parts `lora_A` [r, in, *kernel] and `lora_B` [out, r, 1, ...]; `transposed`: the weight is [in, out]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    transposed: bool

    @property
    def held_bytes(self) -> int:
        """The product of a convolution's factors."""
        return 4 * math.prod(self.shape) if len(self.shape) > 2 else 0

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors; of a convolution, whose cells begin anywhere in an output, their product."""
        if len(self.shape) == 2:
            return parts
        product = parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
        return {"product": product.reshape(-1, self.shape[-1])}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus itself times its rows of the product, in place."""
        if "product" in prepared:
            return cell.addcmul_(cell, prepared["product"][rows.start : rows.stop])
        left, right = factor_rows(rows, prepared, self.transposed)
        for first in range(0, cell.shape[1], _STRETCH):
            some = cell[:, first : first + _STRETCH]
            some.addcmul_(some, left @ right[:, first : first + _STRETCH])
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return has_zero_part(self.parts.values(), constants)


# -- reading -------------------------------------------------------------------------------------------------------


def read_hira(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a HiRA adapter. Raises AdapterError where tensors are missing or do not fit."""
    config = source.config
    ranks = Ranks(config.name, config.rank("r"), 1.0, rank_patterns(config), None)
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, stored, ranks, source, base) for module, stored in modules)


def _update(
    module: str, stored: Mapping[str, StoredTensor], ranks: Ranks, source: Source, base: BaseParameters
) -> Update:
    there = next(iter(stored.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    is_embedding = any(role.startswith("embedding") for role in stored)
    roles = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    check_roles(module, stored, roles, "hira_")
    a, b = (stored[role] for role in roles)
    rank = a.shape[0] if a.shape else 0
    transposed = _orientation(a, b, shape, is_embedding, source, base, parameter.name)
    if transposed is None or not rank:
        raise AdapterError(
            f"{a.name} and {b.name} have shapes {list(a.shape)} and {list(b.shape)}, whose product does not fit"
            f" {parameter.name} of the base, {list(parameter.shape)}; was the adapter trained on this base?"
        )
    if rank != ranks.r:  # PEFT 0.21 gives every module r, whatever rank_pattern says
        ranks.check_rank(source.trained(module), a, rank)
    parts = MappingProxyType({"lora_A": a, "lora_B": b})
    return HiraUpdate(parameter.name, shape, parts, transposed)


def _orientation(
    a: StoredTensor,
    b: StoredTensor,
    shape: Shape,
    is_embedding: bool,
    source: Source,
    base: BaseParameters,
    name: str,
) -> bool | None:
    """Whether the weight is stored as [in, out]; None where the factors do not fit it."""
    rank = a.shape[0] if a.shape else 0
    if len(shape) > 2:
        ones = tuple(1 for _ in shape[2:])
        fits = a.shape == (rank, *shape[1:]) and b.shape == (shape[0], rank, *ones)
        return False if fits and not is_embedding else None
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != rank:
        return None
    if is_embedding:
        return True if shape == (a.shape[1], b.shape[0]) else None
    parameter = base.get(name, a.name)
    return is_transposed(parameter, shape, b.shape[0], a.shape[1], source.config, base)


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_A") and tensor.shape}
    return {"rank": sorted(ranks) or fields.get("r")}


HIRA = Method(
    label="HiRA",
    read=read_hira,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "rank_pattern": USED,
            "fan_in_fan_out": USED,
            "hira_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"hira_\w+",
    orients=True,
    neutral="zero (all hira_A, or all hira_B)",
    formula="W ∘ (1 + B A)",
    layers=("Linear", "Conv1D", "convolutions", "Embedding"),
    facts=_facts,
)
