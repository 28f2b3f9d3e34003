"""Names of stored weights and the parameters that they make: transformers' own conversions, a layer at a time.

transformers fuses experts and splits projections when it loads a checkpoint (`conversion_mapping.py`,
`core_model_loading.py`, 5.20 and later); what it does to all weights at once is done here to those of one parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from streamconv.errors import UnsupportedError
from streamconv.forward.skeleton import Skeleton
from streamconv.system_errors import lacking


@dataclass(frozen=True, slots=True)
class Sources:
    """Stored weights, each with the pattern it matched, that together make `parameter` (and perhaps others)."""

    parameter: str
    weights: Sequence[tuple[str, str]]
    converter: Any | None

    def make(self, skeleton: Skeleton, read: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
        """The parameters by name; `read` gives a stored weight."""
        if self.converter is None:
            return {self.parameter: read(self.weights[0][0])}
        converter = copy.deepcopy(self.converter)
        for weight, pattern in self.weights:
            converter.add_tensor(self.parameter, weight, pattern, read(weight))
        try:
            made = converter.convert(self.parameter, model=skeleton.model, config=skeleton.model.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise lacking(error) or UnsupportedError(
                f"{skeleton.location}: {self.parameter} cannot be made of {self.weights[0][0]} and its like: {error}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def find_sources(skeleton: Skeleton, stored: Iterable[str]) -> Mapping[str, Sources]:
    """Sources of each parameter of the model, by its name. Weights that the model has no use for are left out."""
    mapping = get_model_conversion_mapping(skeleton.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = dict(skeleton.stored), skeleton.model.base_model_prefix
    weights: dict[str, list[tuple[str, str]]] = {}
    how: dict[str, Any | None] = {}
    for name in sorted(stored, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if parameter not in wanted and name in wanted:
            parameter, pattern = name, None
        if parameter in wanted:
            weights.setdefault(parameter, []).append((name, pattern or name))
            how.setdefault(parameter, None if pattern is None else by_pattern[pattern])
    return {parameter: Sources(parameter, found, how[parameter]) for parameter, found in weights.items()}
