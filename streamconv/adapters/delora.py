"""DeLoRA: W + B diag(λ / (r ‖a‖ ‖b‖)) A diag(w), a and b the rows of A and the columns of B, λ a trained bound and
w the norms of the weight's columns when training began (Bini et al. 2025, arXiv 2503.18225), as
`peft/tuners/delora/layer.py` has it. w is saved with the adapter: on a quantized base it is that base's.
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
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, Neutral
from streamconv.adapters.lora import factor_rows
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.ranks import Ranks, rank_patterns
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.delora_(?P<role>A|B|lambda|w_norm)")
_ROLES = ("A", "B", "lambda", "w_norm")
# Least norm that a row or a column is divided by.
_LEAST = 1e-4


@dataclass(frozen=True, slots=True)
class DeloraUpdate(ByRows):
    """Parts `A` [r, in], `B` [out, r], `lambda` [1], `w_norm` [in] of a weight [out, in]."""

    parameter: str
    parts: Mapping[str, StoredTensor]

    @property
    def held_bytes(self) -> int:
        """A with what it is multiplied by; before it, in float64, one of the factors."""
        a, b = (math.prod(self.parts[role].shape) for role in "AB")
        return 8 * max(a, b) + 64 * self.parts["A"].shape[0]

    @property
    def low_rank(self) -> int | None:
        return self.parts["A"].shape[0]

    def input_directions(self, parts: Parts) -> Tensor | None:
        return parts["A"] * parts["w_norm"]

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors of the product, all diagonals multiplied into A."""
        a, b = parts["A"], parts["B"]
        norms = [torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).clamp(min=_LEAST)]
        norms += [torch.linalg.vector_norm(b, dim=0, dtype=torch.float64).clamp(min=_LEAST)]
        shares = (parts["lambda"] / len(a) / (norms[0] * norms[1])).float()
        return {"lora_A": (shares.unsqueeze(1) * a).mul_(parts["w_norm"]), "lora_B": b}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the product, in place."""
        left, right = factor_rows(rows, prepared, transposed=False)
        return torch.addmm(cell, left, right, out=cell)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return has_zero_part(self.parts.values(), constants)


# -- reading -------------------------------------------------------------------------------------------------------


def read_delora(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a DeLoRA adapter. Raises AdapterError where tensors are missing or do not fit."""
    config = source.config
    ranks = Ranks(config.name, config.rank("r"), 1.0, rank_patterns(config), None)
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, parts, ranks, source, base) for module, parts in modules)


def _update(
    module: str, parts: Mapping[str, StoredTensor], ranks: Ranks, source: Source, base: BaseParameters
) -> Update:
    there = next(iter(parts.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    check_roles(module, parts, _ROLES, "delora_")
    a = parts["A"]
    rank = a.shape[0] if a.shape else 0
    is_linear = is_transposed(parameter, shape, None, None, source.config, base) is False
    for role, expected in (
        ("A", (rank, shape[-1])),
        ("B", (shape[0], rank)),
        ("lambda", (1,)),
        ("w_norm", (shape[-1],)),
    ):
        if not is_linear or not rank or parts[role].shape != expected:
            raise AdapterError(
                f"{parts[role].name} has shape {list(parts[role].shape)}, expected {list(expected)} for"
                f" {parameter.name} of the base, {list(parameter.shape)}, the weight of a linear layer; was the adapter"
                " trained on this base?"
            )
    ranks.check_rank(source.trained(module), a, rank)
    return DeloraUpdate(parameter.name, MappingProxyType(dict(parts)))


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_A") and tensor.shape}
    return {"rank": sorted(ranks) or fields.get("r")}


DELORA = Method(
    label="DeLoRA",
    read=read_delora,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "rank_pattern": USED,
            "bias": Neutral("expected none, all or delora_only", ("none", "all", "delora_only")),
            # Where λ began; how far it came is in the tensors.
            "delora_lambda": NO_EFFECT,
            "lambda_pattern": NO_EFFECT,
            "module_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"delora_\w+",
    orients=True,
    neutral="zero (all delora_A, delora_B or delora_lambda)",
    formula="W + B diag(λ / (r ‖a‖ ‖b‖)) A diag(w)",
    facts=_facts,
)
