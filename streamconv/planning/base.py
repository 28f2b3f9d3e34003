"""The base checkpoint as planning sees it: weights, ties, and the one format of what is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.adapters.base import Tie
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Weight
from streamconv.formats.linear import is_conv1d, module_of
from streamconv.planning.plan import (
    Depth,
)
from streamconv.planning.ties import find_tie, without_shared_head


@dataclass(frozen=True, slots=True)
class Base:
    """A base checkpoint as the planner sees it. `quantized`: the format its quantized weights have, or the names of
    several.

    `depth`: how its layers were repeated, in `weights` and in the config; `index.tensors` are as they are stored.
    """

    index: CheckpointIndex
    weights: Mapping[str, Weight]
    tie: Tie | None
    quantized: str | None
    depth: Depth | None = None


def read_base(index: CheckpointIndex, weights: Sequence[Weight]) -> Base:
    """The base of a plan. Raises UnsupportedError where quantized weights that are decoded are transposed."""
    formats = sorted({weight.format for weight in weights if weight.is_quantized})
    for weight in weights:
        if weight.decoder.grid is not None and is_conv1d(module_of(weight.name), index.config):
            raise UnsupportedError(
                f"{index.storage.location}: {weight.name} is a Conv1D, which bitsandbytes stores transposed once it is "
                "quantized; this is not supported yet, give the 16-bit base model instead"
            )
    by_name = without_shared_head({weight.name: weight for weight in weights}, index.config)
    return Base(index, by_name, find_tie(by_name, index.config), " and ".join(formats) or None)
