"""The base checkpoint as planning sees it: weights, ties, and the formats of what is quantized."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from streamconv.adapters.base import Tie
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS
from streamconv.formats.base import Weight, group_of
from streamconv.formats.linear import is_conv1d, module_of
from streamconv.formats.mixed import can_mix
from streamconv.planning.plan import (
    Depth,
)
from streamconv.planning.ties import find_tie, without_shared_head


@dataclass(frozen=True, slots=True)
class Base:
    """A base checkpoint as the planner sees it. `formats` are those of its quantized weights, that of most first;
    `undecoded` those of weights that are not decoded.

    `depth`: how its layers were repeated, in `weights` and in the config; `index.tensors` are as they are stored.
    """

    index: CheckpointIndex
    weights: Mapping[str, Weight]
    tie: Tie | None
    formats: tuple[str, ...]
    depth: Depth | None = None
    undecoded: tuple[str, ...] = ()

    @property
    def quantized(self) -> str | None:
        """Its formats in words; None where nothing is quantized."""
        return " and ".join((*self.formats, *self.undecoded)) or None


def read_base(index: CheckpointIndex, weights: Sequence[Weight]) -> Base:
    """The base of a plan.

    Raises UnsupportedError where its quantized weights are of formats that no config tells apart, or transposed.
    """
    elements = Counter[str]()
    for weight in weights:
        if weight.decoder.grid is not None:
            elements[weight.format] += math.prod(weight.shape)
    formats = sorted(elements, key=lambda each: (-elements[each], each))
    kept = {weight.format for weight in weights if weight.keep is not None}
    _check_together(index, [name for name in formats if name not in kept])
    for weight in weights:
        if weight.decoder.grid is not None and is_conv1d(module_of(weight.name), index.config):
            raise UnsupportedError(
                f"{index.storage.location}: {weight.name} is a Conv1D, which bitsandbytes stores transposed once it is "
                "quantized; this is not supported yet, give the 16-bit base model instead"
            )
    by_name = without_shared_head({weight.name: weight for weight in weights}, index.config)
    undecoded = sorted({weight.format for weight in weights if weight.undecoded is not None})
    tie = find_tie(by_name, index.config)
    return Base(index, by_name, tie, tuple(formats), undecoded=tuple(undecoded))


def _check_together(index: CheckpointIndex, names: Sequence[str]) -> None:
    # Of what is stored otherwise than it would be written, the config is kept, whatever it can tell apart.
    known = [FORMATS[group_of(name)[0]] for name in names if group_of(name)[0] in FORMATS]
    if any(not can_mix(one, other) for one, other in combinations(known, 2)):
        raise UnsupportedError(
            f"{index.storage.location}: its weights are quantized in several formats ({', '.join(sorted(names))}), "
            "which no loader opens together"
        )
