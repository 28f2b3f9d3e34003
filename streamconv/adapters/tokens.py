"""Trained rows of an embedding: row i becomes the adapter's (`trainable_token_indices`,
`peft/tuners/trainable_tokens/layer.py`).

The tensor is called `trainable_tokens_delta`, but holds the new rows, not what is added to the old ones.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.source import BaseParameters, Source, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_FIELD = "trainable_token_indices"


@dataclass(frozen=True, slots=True)
class RowsUpdate(ByRows):
    """Part `rows` [n, columns]; `places` are pairs of a row of the weight and its row in the part, sorted."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    places: tuple[tuple[int, int], ...]

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` with its trained rows replaced, in place."""
        first, last = (bisect_left(self.places, (row, 0)) for row in (rows.start, rows.stop))
        for row, place in self.places[first:last]:
            cell[row - rows.start] = prepared["rows"][place]
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        """Rows are replaced, whatever is in them."""
        return False


def read_tokens(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """One update for every module with trained rows. Raises AdapterError where config and tensors disagree."""
    indices = source.config.fields.get(_FIELD)
    found: list[Update] = []
    for key, tensor in source.tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            module = match["module"]
            found.append(rows_update(module, tensor, _FIELD, f"{module}.token_adapter", source, base))
    if indices and not found:
        raise AdapterError(
            f"{source.config.name}: {_FIELD} lists trained tokens, but the adapter holds no tensor of them; the"
            " file is not complete"
        )
    return tuple(found)


def rows_update(
    module: str, tensor: StoredTensor, field: str, wrapper: str, source: Source, base: BaseParameters
) -> RowsUpdate:
    """The update by `tensor`, whose rows the config's `field` lists; below `wrapper` the weight is saved if it was
    resized. Raises AdapterError where config and tensor disagree.
    """
    parameter = base.get(f"{module}.weight", tensor.name)
    shape = trained_shape(source, parameter, f"{wrapper}.base_layer.weight")
    rows = _indices(source.config, source.trained(module), tensor, field)
    if len(shape) != 2 or tensor.shape != (len(rows), shape[1]):
        raise AdapterError(
            f"{tensor.name} has shape {list(tensor.shape)}, expected [{len(rows)}, {shape[-1]}]: a row for each of"
            f" the {len(rows)} tokens that {field} in {source.config.name} lists"
        )
    if rows and max(rows) >= shape[0]:
        raise AdapterError(
            f"{source.config.name}: {field} lists token {max(rows)}, but {parameter.name} has {shape[0]} rows; the"
            " vocabulary was resized in training: resize the base in the same way and save it first"
        )
    places = tuple(sorted((row, place) for place, row in enumerate(rows)))
    return RowsUpdate(parameter.name, shape, MappingProxyType({"rows": tensor}), places)


def _indices(config: AdapterConfig, module: str, tensor: StoredTensor, field: str) -> Sequence[int]:
    """The rows of `module`: a list is for the embedding, an object has lists by the end of a module's path."""
    value = config.fields.get(field)
    if isinstance(value, dict):
        ends = [name for name in value if module == name or module.endswith(f".{name}")]
        # Tied modules with the same rows are saved as one, and after a resize as both.
        value = value[ends[0]] if ends else next(iter(value.values()), None) if len(value) == 1 else None
    if not isinstance(value, list) or not all(type(row) is int and row >= 0 for row in value):
        raise AdapterError(f"{config.name}: {field} must list the rows of {tensor.name}, found {value!r}")
    if len(set(value)) != len(value):
        raise AdapterError(f"{config.name}: {field} lists a token twice for {tensor.name}")
    return value
