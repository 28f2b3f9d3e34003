"""LN tuning: norms, or what else is targeted, as they were trained, whole (Zhao et al. 2023, arXiv 2312.11420,
`peft/tuners/ln_tuning/layer.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update
from streamconv.adapters.config import COMMON_FIELDS
from streamconv.adapters.method import Method
from streamconv.adapters.source import BaseParameters, Source, by_module
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+?)\.ln_tuning_layers\.(?P<role>.+)")


@dataclass(frozen=True, slots=True)
class TrainedUpdate(ByRows):
    """Part `trained`, of the parameter's shape, which takes its place."""

    parameter: str
    parts: Mapping[str, StoredTensor]

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` with the values that were trained."""
        trained = prepared["trained"].reshape(-1, cell.shape[1])
        return cell.copy_(trained[rows.start : rows.stop])

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        """Values are replaced, whatever they are."""
        return False


def read_ln_tuning(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """One update for every parameter of a trained module. Raises AdapterError where one does not fit the base."""
    modules = by_module(source, _KEY).items()
    return tuple(
        _update(f"{module}.{role}", tensor, base)
        for module, parts in modules
        for role, tensor in parts.items()
    )


def _update(name: str, tensor: StoredTensor, base: BaseParameters) -> Update:
    parameter = base.get(name, tensor.name)
    if tensor.shape != parameter.shape or not tensor.shape:
        raise AdapterError(
            f"{tensor.name} has shape {list(tensor.shape)}, which cannot replace {name} of the base,"
            f" {list(parameter.shape)}; was the adapter trained on this base?"
        )
    return TrainedUpdate(parameter.name, MappingProxyType({"trained": tensor}))


LN_TUNING = Method(
    label="LN tuning",
    read=read_ln_tuning,
    fields=COMMON_FIELDS,
    keys="ln_tuning_layers",
    neutral="of no parameter",
    formula="the trained parameters in place of W",
    layers=("norms",),
)
