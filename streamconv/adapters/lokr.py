"""LoKr: W + s·C ⊗ D, a Kronecker product (Yeh et al. 2023, arXiv 2309.14859, §3.2), as `peft/tuners/lokr/layer.py` has
it:

    W[a·|b| + b, c·|d| + d] + s·C[a, c] D[b, d]

Either factor may be a product of two, C = A₁ B₁; D has the kernel of a convolution, flattened in B₂, or in a Tucker
decomposition as LoHa's (`use_effective_conv2d`). s is alpha / r, with whole factors as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED
from streamconv.adapters.method import Method
from streamconv.adapters.ranks import Ranks, read_ranks
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.lokr_(?P<role>w[12]|w[12]_[ab]|t2)")
# Columns of a factor that are made at a time: a cell's memory has no room for another.
_STRETCH = 4096


@dataclass(frozen=True, slots=True)
class LokrUpdate(ByRows):
    """Parts `w1` [|a|, |c|] or `w1_a` [|a|, r] and `w1_b` [r, |c|]; `w2` [|b|, |d|, *kernel], or `w2_a` [|b|, r] and
    `w2_b` [r, |d|·kernel], or with `t2` [r, r, *kernel] `w2_a` [r, |b|] and `w2_b` [r, |d|].
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float

    @property
    def held_bytes(self) -> int:
        """Bytes held for a convolution: the update itself, and copies while it is made; 0 for a matrix."""
        return 3 * 4 * math.prod(self.shape) if len(self.shape) > 2 else 0

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors; of a convolution, whose cells begin anywhere in an output, their product without s."""
        if len(self.shape) == 2:
            return parts
        left = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
        right = _kernels(parts)
        if right.dim() == 3:
            # Where kernels have one axis, PEFT takes the left factor for [1, |a|, |c|]: what results is no product of
            # channels any more, but it is what was trained.
            product = left[None, :, None, :, None] * right[:, None, :, None, :]
        else:
            product = left[:, None, :, None] * right.reshape(1, right.shape[0], 1, -1)
        return {"delta": product.reshape(-1, self.shape[-1])}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, in place."""
        if "delta" in prepared:
            return cell.add_(prepared["delta"][rows.start : rows.stop], alpha=self.scaling)
        height, width = _sides(prepared, "w2")
        numbers = torch.arange(rows.start, rows.stop, device=cell.device)
        above, below = numbers // height, numbers % height
        blocks = cell.view(len(rows), -1, width)
        for inner in _stretches(width):
            right = _rows(prepared, "w2", below, inner).unsqueeze(1)
            for outer in _stretches(blocks.shape[1]):
                left = _rows(prepared, "w1", above, outer).unsqueeze(2)
                blocks[:, outer, inner].addcmul_(left, right, value=self.scaling)
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.scaling == 0 or has_zero_part(self.parts.values(), constants)


def _sides(prepared: Parts, factor: str) -> Sequence[int]:
    """Height and width of a factor, whole or of two."""
    if factor in prepared:
        return prepared[factor].shape
    return prepared[f"{factor}_a"].shape[0], prepared[f"{factor}_b"].shape[1]


def _stretches(width: int) -> Sequence[slice]:
    return [slice(first, first + _STRETCH) for first in range(0, width, _STRETCH)]


def _rows(prepared: Parts, factor: str, rows: Tensor, columns: slice) -> Tensor:
    """Rows of a factor, some columns of them."""
    if factor in prepared:
        return prepared[factor][:, columns].index_select(0, rows)
    return prepared[f"{factor}_a"].index_select(0, rows) @ prepared[f"{factor}_b"][:, columns]


def _kernels(parts: Parts) -> Tensor:
    """The right factor of a convolution, [|b|, |d|, *kernel], or flattened [|b|, |d|·kernel]."""
    if "w2" in parts:
        return parts["w2"]
    if "t2" in parts:
        return torch.einsum("ijkl,ip,jr->prkl", parts["t2"], parts["w2_a"], parts["w2_b"])
    return parts["w2_a"] @ parts["w2_b"]


# -- reading -------------------------------------------------------------------------------------------------------


def read_lokr(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a LoKr adapter. Raises AdapterError where tensors are missing or do not fit."""
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
    _check_roles(module, parts)
    trained = source.trained(module)
    for role in ("w1_b", "w2_b"):
        if role in parts and parts[role].shape:
            ranks.check_rank(trained, parts[role], parts[role].shape[0])
    if not _fits(parts, shape, ranks.rank(trained)):
        found = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in parts.values())
        raise AdapterError(
            f"{found}: these are no factors of a Kronecker product of the shape that {parameter.name} of the base has,"
            f" {list(parameter.shape)}; was the adapter trained on this base?"
        )
    scaling = ranks.alpha_of(trained) / ranks.rank(trained)
    return LokrUpdate(parameter.name, shape, MappingProxyType(dict(parts)), scaling)


def _check_roles(module: str, parts: Mapping[str, StoredTensor]) -> None:
    """Raise AdapterError unless each factor is there once, whole or as the product of two."""
    for factor in ("w1", "w2"):
        pair = (f"{factor}_a", f"{factor}_b")
        core = "t2" in parts and factor == "w2"
        there = [parts[role] for role in pair if role in parts] + ([parts["t2"]] if core else [])
        if factor in parts and there:
            raise AdapterError(
                f"{parts[factor].name} and {there[0].name} are both there, but a factor is saved whole or as a product,"
                " not both; remove the one that was not trained"
            )
        missing = [role for role in pair if role not in parts] if there else [factor]
        if factor not in parts and missing:
            raise AdapterError(
                f"{module}.lokr_{missing[0]} is missing, though {next(iter(parts.values())).name} is there; the file is"
                " not complete"
            )


def _fits(parts: Mapping[str, StoredTensor], shape: Shape, rank: int) -> bool:
    """Whether the factors' product has as many outputs, inputs and entries of a kernel as a weight of `shape`."""
    if len(shape) not in (2, 3, 4):
        return False
    shapes = {role: part.shape for role, part in parts.items()}
    kernel, flat = shape[2:], math.prod(shape[2:])
    left = shapes.get("w1") or _product(shapes["w1_a"], shapes["w1_b"], rank)
    right: Shape | None
    if "w2" in shapes:
        right = shapes["w2"]
    elif "t2" in shapes:
        core = (rank, rank, *kernel, *((1,) if len(kernel) == 1 else ()))
        a, b = shapes["w2_a"], shapes["w2_b"]
        is_tucker = shapes["t2"] == core and len(a) == len(b) == 2 and a[0] == b[0] == rank and bool(kernel)
        right = (a[1], b[1], *kernel) if is_tucker else None
    else:
        right = _product(shapes["w2_a"], shapes["w2_b"], rank)
        right = (right[0], right[1] // flat, *kernel) if right and right[1] % flat == 0 else None
    if left is None or right is None or len(left) != 2 or len(right) != len(shape):
        return False
    return (left[0] * right[0], left[1] * right[1], *right[2:]) == shape


def _product(a: Shape, b: Shape, rank: int) -> Shape | None:
    is_product = len(a) == len(b) == 2 and a[1] == b[0] == rank
    return (a[0], b[1]) if is_product else None


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del tensors
    return {"rank": fields.get("r"), "alpha": fields.get("alpha")}


LOKR = Method(
    label="LoKr",
    read=read_lokr,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "alpha": USED,
            "rank_pattern": USED,
            "alpha_pattern": USED,
            # What these chose shows in the tensors.
            "use_effective_conv2d": NO_EFFECT,
            "decompose_both": NO_EFFECT,
            "decompose_factor": NO_EFFECT,
            "rank_dropout": NO_EFFECT,
            "rank_dropout_scale": NO_EFFECT,
            "module_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"lokr_\w+",
    neutral="zero (one of the factors lokr_*, or alpha)",
    formula="W + s · C ⊗ D, each whole or a product",
    layers=("Linear", "convolutions"),
    facts=_facts,
)
