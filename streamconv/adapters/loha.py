"""LoHa: W + s·(A₁ B₁) ∘ (A₂ B₂) (Hyeon-Woo et al. 2022, arXiv 2108.06098, proposition 1), as
`peft/tuners/loha/layer.py` has it.

Kernels of a convolution are flattened, [out, in·kernel]; or with `use_effective_conv2d` each factor is a Tucker
decomposition (proposition 3), T [r, r, *kernel], A [r, out], B [r, in]:

    W[o, c, κ] + s·Π Σ_ij T[i, j, κ] B[j, c] A[i, o]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parameter, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, AdapterConfig
from streamconv.adapters.method import Method
from streamconv.adapters.ranks import Ranks, read_ranks
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.hada_(?P<role>w[12]_[ab]|t[12])")
_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")
_CORES = ("t1", "t2")
# Columns of a product at a time: a cell's memory has no room for two of its size.
_STRETCH = 4096


@dataclass(frozen=True, slots=True)
class LohaUpdate(ByRows):
    """Parts `w1_a` [out, r], `w1_b` [r, in], and `w2_a`, `w2_b` alike, in is in·kernel of a convolution; or with `t1`,
    `t2` [r, r, *kernel] those of the Tucker decomposition.
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float

    @property
    def held_bytes(self) -> int:
        """Bytes held for a convolution: the update itself, and the two factors while it is made; 0 for a matrix."""
        return 4 * 4 * math.prod(self.shape) if len(self.shape) > 2 else 0

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors; of a convolution, whose cells begin anywhere in an output, their product without s."""
        if len(self.shape) == 2:
            return parts
        one, other = (_factor(parts, number) for number in "12")
        return {"delta": one.mul_(other).reshape(-1, self.shape[-1])}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, in place."""
        some = slice(rows.start, rows.stop)
        if "delta" in prepared:
            return cell.add_(prepared["delta"][some], alpha=self.scaling)
        for first in range(0, cell.shape[1], _STRETCH):
            columns = slice(first, first + _STRETCH)
            one, other = (
                prepared[f"w{number}_a"][some] @ prepared[f"w{number}_b"][:, columns] for number in "12"
            )
            cell[:, columns].addcmul_(one, other, value=self.scaling)
        return cell

    def weighed(self, weight: float) -> Self | None:
        return replace(self, scaling=weight * self.scaling)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.scaling == 0 or has_zero_part(self.parts.values(), constants)


def _factor(parts: Parts, number: str) -> Tensor:
    a, b = parts[f"w{number}_a"], parts[f"w{number}_b"]
    if f"t{number}" not in parts:
        return a @ b
    return torch.einsum("ijkl,jc,io->ockl", parts[f"t{number}"], b, a)


def read_loha(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a LOHA adapter. Raises AdapterError where tensors are missing or do not fit."""
    ranks = read_ranks(source.config, "alpha")
    return tuple(
        _update(module, parts, ranks, source, base) for module, parts in by_module(source, _KEY).items()
    )


def _update(
    module: str, parts: Mapping[str, StoredTensor], ranks: Ranks, source: Source, base: BaseParameters
) -> Update:
    there = next(iter(parts.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    is_tucker = not parts.keys().isdisjoint(_CORES)
    _check_roles(module, parts, source.config, is_tucker)
    trained = source.trained(module)
    rank = parts["w1_b"].shape[0] if parts["w1_b"].shape else 0
    _check_shapes(parts, parameter, shape, rank, is_tucker)
    ranks.check_rank(trained, parts["w1_b"], rank)
    return LohaUpdate(parameter.name, shape, MappingProxyType(dict(parts)), ranks.alpha_of(trained) / rank)


def _check_roles(
    module: str, parts: Mapping[str, StoredTensor], config: AdapterConfig, is_tucker: bool
) -> None:
    check_roles(module, parts, (*_FACTORS, *(_CORES if is_tucker else ())), "hada_")
    if is_tucker and not config.flag("use_effective_conv2d"):
        raise AdapterError(
            f"{parts['t1'].name} belongs to use_effective_conv2d, which is not set in {config.name}; config and tensors"
            " are not of one adapter"
        )


def _check_shapes(
    parts: Mapping[str, StoredTensor], parameter: Parameter, shape: Shape, rank: int, is_tucker: bool
) -> None:
    """Raise AdapterError unless every tensor is of the one shape that the weight allows."""
    kernel = shape[2:]
    a: Shape = ()
    b: Shape = ()
    if is_tucker and len(shape) in (3, 4):
        a, b = (rank, shape[0]), (rank, shape[1])
    elif not is_tucker and len(shape) > 1:
        a, b = (shape[0], rank), (rank, math.prod(shape[1:]))
    core = (rank, rank, *kernel, *((1,) if len(kernel) == 1 else ()))
    for role, tensor in parts.items():
        expected = core if role in _CORES else a if role.endswith("a") else b
        if rank < 1 or tensor.shape != expected:
            raise AdapterError(
                f"{tensor.name} has shape {list(tensor.shape)}, which does not fit {parameter.name} of the base,"
                f" {list(parameter.shape)}{f'; expected {list(expected)}' if expected else ''}; was the adapter"
                " trained on this base?"
            )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith("hada_w1_b")})
    return {"rank": ranks[0] if len(ranks) == 1 else ranks, "alpha": fields.get("alpha")}


LOHA = Method(
    label="LoHa",
    read=read_loha,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "alpha": USED,
            "rank_pattern": USED,
            "alpha_pattern": USED,
            "use_effective_conv2d": USED,
            "rank_dropout": NO_EFFECT,
            "module_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"hada_\w+",
    neutral="zero (one of the factors hada_*, or alpha)",
    formula="W + s · (A₁ B₁) ∘ (A₂ B₂)",
    layers=("Linear", "convolutions"),
    facts=_facts,
)
