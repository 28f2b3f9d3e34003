"""LoRA: W + s·B A (Hu et al. 2021, arXiv 2106.09685, §4.1), KaSA: W + s·B diag(d) A (Wang et al. 2024, arXiv
2412.06071, eq. 6), and DoRA: m ⊙ V / ‖V‖ with V = W + s·B A (Liu et al. 2024, arXiv 2402.09353, eq. 5), as
`peft/tuners/lora/layer.py`, `variants.py` and `dora.py` have them.

`nn.Linear` stores W as [out, in]. GPT-2's `Conv1D` stores it as [in, out], and so does an embedding, which takes one
of V tokens as its input; A [r, in] and B [out, r] are the same for all, so there the update is transposed, and the
norms of DoRA, one an output, are those of columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, Product, State, Update, UpdateAccess, has_zero_part
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_IN_FLOAT64 = 2**21  # elements that a device has in float64 at once: as many bytes as half of a cell
NO_PARTS: Mapping[str, StoredTensor] = MappingProxyType({})


class OfFactors(ByRows):
    """Defaults of an update by a product of factors, `lora_A` [r, ...] and another."""

    __slots__ = ()

    parts: Mapping[str, StoredTensor]
    scaling: float

    @property
    def low_rank(self) -> int | None:
        return self.parts["lora_A"].shape[0]

    def weighed(self, weight: float) -> Update | None:
        found: Any = replace(self, scaling=weight * self.scaling)  # type: ignore[type-var]  # each is a dataclass
        return cast("Update", found)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.scaling == 0 or has_zero_part(self.parts.values(), constants)


@dataclass(frozen=True, slots=True)
class LoraUpdate(OfFactors):
    """Parts `lora_A` [r, in], `lora_B` [out, r], of KaSA `diagonal` [r]; `transposed`: the weight is [in, out]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool

    @property
    def held_bytes(self) -> int:
        return 4 * math.prod(self.parts["lora_A"].shape) if "diagonal" in self.parts else 0

    @property
    def cell_copies(self) -> float:
        """No copies: the cell is changed in place."""
        return 0

    @property
    def mirror(self) -> Mapping[str, str]:
        """An embedding's factors are saved again as those of a head that is tied to it."""
        return {"lora_A": "lora_B", "lora_B": "lora_A"}

    @property
    def product(self) -> Product | None:
        if "diagonal" in self.parts:
            return None
        return Product("lora_B", "lora_A", self.scaling, replace(self, parts=NO_PARTS, scaling=1.0))

    def input_directions(self, parts: Parts) -> Tensor | None:
        return None if self.transposed else parts["lora_A"]

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The two factors, KaSA's diagonal multiplied into A."""
        if "diagonal" not in parts:
            return parts
        return {"lora_A": parts["diagonal"].unsqueeze(1) * parts["lora_A"], "lora_B": parts["lora_B"]}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of s·B A, in place; one rounding to the stored type happens later."""
        left, right = factor_rows(rows, prepared, self.transposed)
        return torch.addmm(cell, left, right, alpha=self.scaling, out=cell)


@dataclass(frozen=True, slots=True)
class DoraUpdate(OfFactors):
    """Parts of LoRA and `magnitude` [out], the norm that each output's weights are given.

    Norms are summed in float64. An output whose weights are all zero has no direction: PEFT's live layer
    divides by zero and answers NaN, so here it is an error.
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool

    @property
    def access(self) -> UpdateAccess:
        """Rows of a transposed weight are parts of all outputs, whose norms need every row first."""
        return UpdateAccess.REDUCE_THEN_ROW if self.transposed else UpdateAccess.ROW

    @property
    def cell_copies(self) -> float:
        """Copies of a transposed weight's cell in float32 and in float64; else of some rows in float64."""
        return 3 if self.transposed else 0.5

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        """Sum of squares of each column so far, float64 [out]."""
        left, right = factor_rows(rows, prepared, self.transposed)
        updated = torch.addmm(cell, left, right, alpha=self.scaling)
        squares = updated.double().square_().sum(dim=0)
        return (state[0] + squares,) if state else (squares,)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` as rows of m ⊙ V / ‖V‖, in place."""
        magnitude = prepared["magnitude"].double()
        left, right = factor_rows(rows, prepared, self.transposed)
        updated = torch.addmm(cell, left, right, alpha=self.scaling, out=cell)
        if self.transposed:
            (squares,) = state
            return updated.mul_(dora_gain(self.parameter, magnitude, squares.sqrt(), 0))
        some = torch.split(updated, max(1, _IN_FLOAT64 // max(updated.shape[1], 1)))
        norms = torch.cat([torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in some])
        gain = dora_gain(self.parameter, magnitude[rows.start : rows.stop], norms, rows.start)
        return updated.mul_(gain.unsqueeze(1))

    def weighed(self, weight: float) -> Update | None:
        return None

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        """Whether norms are those of the base is not known before the base is read."""
        return False


@dataclass(frozen=True, slots=True)
class LoraBiasUpdate(ByRows):
    """Part `bias` [out], the bias of lora_B (`lora_bias`): b + s·bias."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` [1, out], the whole bias, plus s·bias, in place."""
        return cell.add_(prepared["bias"], alpha=self.scaling)

    def weighed(self, weight: float) -> Self | None:
        return replace(self, scaling=weight * self.scaling)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.scaling == 0 or has_zero_part(self.parts.values(), constants)


def dora_gain(parameter: str, magnitude: Tensor, norms: Tensor, first: int) -> Tensor:
    """m / ‖V‖ in float32, for the outputs from `first` on.

    Raises AdapterError where a norm is 0, on a CPU. A GPU would have to be waited for: there the rows become NaN, which
    no output may hold.
    """
    if norms.is_cpu and not bool(norms.all()):
        output = first + int((norms == 0).nonzero()[0])
        raise AdapterError(
            f"{parameter}: the weights of output {output} are all zero after the LoRA update, so"
            " DoRA cannot scale them; the adapter does not work unmerged either"
        )
    return magnitude.div(norms).float()


def factor_rows(rows: range, prepared: Parts, transposed: bool) -> tuple[Tensor, Tensor]:
    """Views of the factors whose product is `rows` of B A, or of its transpose."""
    a, b = prepared["lora_A"], prepared["lora_B"]
    if transposed:
        return a[:, rows.start : rows.stop].T, b.T
    return b[rows.start : rows.stop], a
