"""SHiRA: W plus a sparse matrix (Bhardwaj et al. 2024, arXiv 2406.13175), as `peft/tuners/shira/layer.py` has it:
n numbers, and the row and the column of each. Where a place is listed twice, both are added.
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

from streamconv.adapters.base import ByRows, Parts, State, Update
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.shira_(?P<role>weight|indices)")
_ROLES = ("weight", "indices")
# Bytes for each number while they are sorted: its place, the order, both sorted, row and column, checks.
_SORTING = 56


@dataclass(frozen=True, slots=True)
class ShiraUpdate(ByRows):
    """Parts `weight` [n] and `indices` [2, n], whole numbers: rows and columns of the weight [out, in]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]

    @property
    def held_bytes(self) -> int:
        return _SORTING * self.parts["weight"].shape[0] + 2 * 8 * (self.shape[0] + 1)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """Numbers and columns by rows, their rows, and on the CPU where each row begins among them.

        Raises AdapterError for a place that the weight does not have.
        """
        rows, columns = parts["indices"].long()
        self._check(parts["indices"])
        order = torch.sort(rows, stable=True).indices
        rows, columns = rows[order], columns[order]
        starts = torch.searchsorted(rows, torch.arange(self.shape[0] + 1, device=rows.device))
        return {"numbers": parts["weight"][order], "rows": rows, "columns": columns, "starts": starts.cpu()}

    def _check(self, indices: Tensor) -> None:
        rows, columns = self.shape
        bound = torch.tensor([[rows], [columns]], device=indices.device)
        if bool(((indices < 0) | (indices >= bound) | (indices != indices.floor())).any()):
            raise AdapterError(
                f"{self.parts['indices'].name} holds numbers that are no rows and columns of {self.parameter},"
                f" {list(self.shape)}; was the adapter trained on this base?"
            )

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus the numbers that lie in it, in place."""
        first, last = (int(prepared["starts"][row]) for row in (rows.start, rows.stop))
        some = slice(first, last)
        place = (prepared["rows"][some] - rows.start, prepared["columns"][some])
        return cell.index_put_(place, prepared["numbers"][some], accumulate=True)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return constants.get(self.parts["weight"].name) == 0


# -- reading -------------------------------------------------------------------------------------------------------


def read_shira(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a SHiRA adapter. Raises AdapterError where tensors are missing or do not fit."""
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, parts, source, base) for module, parts in modules)


def _update(module: str, parts: Mapping[str, StoredTensor], source: Source, base: BaseParameters) -> Update:
    there = next(iter(parts.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    check_roles(module, parts, _ROLES, "shira_")
    numbers, indices = parts["weight"], parts["indices"]
    count = math.prod(numbers.shape)
    is_linear = is_transposed(parameter, shape, None, None, source.config, base) is False
    if not is_linear or numbers.shape != (count,) or indices.shape != (2, count):
        raise AdapterError(
            f"{numbers.name} and {indices.name} have shapes {list(numbers.shape)} and {list(indices.shape)}, expected"
            f" [n] and [2, n], for the weight of a linear layer; {parameter.name} of the base has shape"
            f" {list(parameter.shape)}"
        )
    expected = source.config.rank("r") * sum(shape)
    if count != expected:
        raise AdapterError(
            f"{numbers.name} has {count} numbers, but r in {source.config.name} and {parameter.name} of the base,"
            f" {list(parameter.shape)}, give {expected}; was the adapter trained on this base?"
        )
    return ShiraUpdate(parameter.name, shape, MappingProxyType(dict(parts)))


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    numbers = (tensor for name, tensor in tensors.items() if name.endswith("shira_weight"))
    return {"r": fields.get("r"), "numbers": sum(math.prod(tensor.shape) for tensor in numbers)}


SHIRA = Method(
    label="SHiRA",
    read=read_shira,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "fan_in_fan_out": USED,
            # Which places were chosen is in the tensors.
            "mask_type": NO_EFFECT,
            "random_seed": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"shira_\w+",
    orients=True,
    neutral="zero (all shira_weight)",
    formula="W + a sparse matrix",
    indices="shira_indices",
    facts=_facts,
)
