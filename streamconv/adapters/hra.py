"""HRA: W H₁ … H_r, a chain of Householder reflections H = I - 2 û ûᵀ of inputs, û = u / ‖u‖ (Yuan et al. 2024, arXiv
2405.17484), as `peft/tuners/hra/layer.py` has it. u are the columns of U [in, r]; with `apply_GS` they are made
orthonormal first, in their order.

No matrix [in, in] is made of them. A chain of reflections is I - U T Uᵀ with T [r, r] upper triangular (the compact WY
form of Schreiber and Van Loan 1989), the inverse of what stands on and above the diagonal of Uᵀ U, the diagonal halved:

    W H₁ … H_r = W - (W U) (T Uᵀ)
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

from streamconv.adapters.base import ByRows, Parts, State, Update, WholeWeight
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, Neutral
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>hra_u)")
# Share of its length that a column must have across those before it, or rounding alone would say where it points.
_ACROSS = 1e-6


@dataclass(frozen=True, slots=True)
class HraUpdate(ByRows):
    """Part `hra_u` [in, r] of a weight [out, in]; `orthogonal`: its columns are made so before they reflect."""

    parameter: str
    parts: Mapping[str, StoredTensor]
    orthogonal: bool

    @property
    def held_bytes(self) -> int:
        return _held_bytes(self.parts["hra_u"])

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """U [in, r] and T Uᵀ [r, in]."""
        return _reflections(parts["hra_u"], self.orthogonal)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` reflected, in place."""
        return _reflect(cell, prepared)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return _is_neutral(self.parts["hra_u"], constants, self.orthogonal)


@dataclass(frozen=True, slots=True)
class WholeHraUpdate(WholeWeight):
    """HRA of a convolution, whose kernels are flattened: [out, in·kernel]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    orthogonal: bool

    @property
    def held_bytes(self) -> int:
        """The weight, and what is made of the adapter's tensor."""
        return 4 * math.prod(self.shape) + _held_bytes(self.parts["hra_u"])

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return _reflections(parts["hra_u"], self.orthogonal)

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        """The reflected weight, in place."""
        return _reflect(whole.view(self.shape[0], -1), prepared).view(whole.shape)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return _is_neutral(self.parts["hra_u"], constants, self.orthogonal)


def _reflect(rows: Tensor, prepared: Parts) -> Tensor:
    return torch.addmm(rows, rows @ prepared["u"], prepared["v"], alpha=-1, out=rows)


def _reflections(columns: Tensor, orthogonal: bool) -> Parts:
    """U and T Uᵀ in float32, made in float64; NaN, which no output may hold, of a column that points nowhere."""
    u = columns.double()
    if orthogonal:
        norms = torch.linalg.vector_norm(u, dim=0)
        # Signs of its columns do not matter: each stands twice in what is subtracted.
        u, triangle = torch.linalg.qr(u)
        u = u.div_(triangle.diagonal().abs() > _ACROSS * norms)
        return {"u": u.float(), "v": (2 * u).T.float()}
    acts = ~_is_undone(columns)
    both = acts.outer(acts)
    one = torch.eye(len(acts), dtype=u.dtype, device=u.device)
    above = torch.where(both, u.T @ u, one).triu()
    above.diagonal().div_(2)
    t = torch.linalg.solve_triangular(above, one, upper=True).mul_(both)
    return {"u": columns, "v": (u @ t.T).T.float()}


def _is_undone(columns: Tensor) -> Tensor:
    """Mask of columns that come in pairs of equals, which reflect there and back: training begins with such, and
    where it left them no bit changes.
    """
    found = torch.zeros(columns.shape[1], dtype=torch.bool, device=columns.device)
    pairs = columns.shape[1] // 2 * 2
    found[:pairs] = (columns[:, 0:pairs:2] == columns[:, 1:pairs:2]).all(dim=0).repeat_interleave(2)
    return found & columns.any(dim=0)


def _held_bytes(columns: StoredTensor) -> int:
    """Bytes of both factors, and of the three of their size in float64 that they are made by; small squares."""
    return (2 * 4 + 3 * 8) * math.prod(columns.shape) + 6 * 8 * columns.shape[1] ** 2


def _is_neutral(columns: StoredTensor, constants: Mapping[str, float], orthogonal: bool) -> bool:
    """Whether all columns are one: of an even number, as training begins, each undoes the one before it."""
    return bool(constants.get(columns.name)) and columns.shape[1] % 2 == 0 and not orthogonal


# -- reading -------------------------------------------------------------------------------------------------------


def read_hra(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of an HRA adapter. Raises AdapterError where tensors do not fit base or config."""
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, parts["hra_u"], source, base) for module, parts in modules)


def _update(module: str, columns: StoredTensor, source: Source, base: BaseParameters) -> Update:
    parameter = base.get(f"{module}.weight", columns.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    config = source.config
    is_convolution = len(shape) == 4 and shape[2] == shape[3]
    inputs = columns.shape[0] if len(columns.shape) == 2 else 0
    fits = is_convolution and inputs == math.prod(shape[1:])
    if len(shape) == 2 and inputs:
        fits = is_transposed(parameter, shape, None, inputs, config, base) is False
    if not fits:
        raise AdapterError(
            f"{columns.name} has shape {list(columns.shape)}, expected [inputs, r] for {parameter.name} of the base,"
            f" {list(parameter.shape)}; was the adapter trained on this base?"
        )
    if columns.shape[1] != config.rank("r"):
        raise AdapterError(
            f"{columns.name} has {columns.shape[1]} reflections, but r is {config.rank('r')} in {config.name}; config"
            " and tensors are not of one adapter"
        )
    parts = MappingProxyType({"hra_u": columns})
    orthogonal = config.flag("apply_GS")
    if is_convolution:
        return WholeHraUpdate(parameter.name, shape, parts, orthogonal)
    return HraUpdate(parameter.name, parts, orthogonal)


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del tensors
    return {"reflections": fields.get("r"), "apply_GS": bool(fields.get("apply_GS"))}


HRA = Method(
    label="HRA",
    multiplies=True,
    read=read_hra,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "apply_GS": USED,
            "bias": Neutral("expected none, all or hra_only", ("none", "all", "hra_only")),
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"hra_\w+",
    orients=True,
    neutral="a chain of reflections that undo each other",
    formula="W H₁ … H_r, H = I - 2 û ûᵀ",
    layers=("Linear", "convolutions"),
    facts=_facts,
)
