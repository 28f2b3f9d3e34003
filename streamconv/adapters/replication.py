"""`layer_replication`: the model that was trained had layers of the base in another order, some of them repeated.

`[[0, 4], [2, 5]]` stands for the layers 0 1 2 3 2 3 4 of the base, numbered anew, each with an adapter of its own
(`replicate_layers` in `peft/tuners/tuners_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import chain

from streamconv.adapters.config import AdapterConfig, is_empty
from streamconv.adapters.source import Source
from streamconv.adapters.targets import ALL_LINEAR
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import AdapterError

Range = tuple[int, int]

# Where PEFT looks for layers, in the names that a base may have.
LAYER = re.compile(
    r"(?P<stack>(?:model\.)*layers|(?:model\.)*(?:bert\.)?encoder\.layer|(?:transformer\.)?h)"
    r"\.(?P<number>0|[1-9][0-9]{0,5})\.(?P<rest>.+)"
)
_MOST_LAYERS = 10_000


def read_ranges(config: AdapterConfig) -> tuple[Range, ...]:
    """Ranges [start, end) of layers of the base, in the order of the trained model; none if it has those of the base.

    Raises AdapterError for what are no ranges. Where the base's layers end is not known here; a method without the
    field refuses it as unknown when it is read.
    """
    value = config.fields.get("layer_replication")
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise _refusal(config, "it is no list")
    for pair in value:
        if (
            not isinstance(pair, list)
            or [type(end) for end in pair] != [int, int]
            or not 0 <= pair[0] < pair[1]
        ):
            raise _refusal(config, f"{shown(pair)} is no such range")
    if sum(end - start for start, end in value) > _MOST_LAYERS:
        raise _refusal(config, f"that makes more than {_MOST_LAYERS} layers")
    return tuple((start, end) for start, end in value)


def _refusal(config: AdapterConfig, reason: str) -> AdapterError:
    return AdapterError(
        f"{config.name}: layer_replication is {shown(config.fields['layer_replication'])}, expected a list of ranges"
        f" [start, end) of layers of the base with 0 <= start < end, but {reason}"
    )


def check_every_layer(source: Source, modules: Iterable[str], covered: Collection[str]) -> None:
    """Raise AdapterError where layers are repeated and the adapter does not reach all of them.

    An adapter of the base as it is would fit the first layers and leave the rest as they are. `modules` are those of
    the base, layers repeated; `covered` those that the adapter changes. Nothing is known where the config may mean
    some layers only.
    """
    config = source.config
    if not read_ranges(config) or _may_mean_some(config):
        return
    adapted = {match["rest"] for match in map(LAYER.fullmatch, covered) if match}
    for module in modules:
        match = LAYER.fullmatch(module)
        if match and match["rest"] in adapted and module not in covered:
            raise AdapterError(
                f"{source.location}: layer_replication in {config.name} repeats layers, and the adapter holds no"
                f" tensors for {module}, though it does for {match['rest']} of others; the file is not complete, or"
                " was trained without repeated layers: then remove the field"
            )


def _may_mean_some(config: AdapterConfig) -> bool:
    """Whether the config could choose a module in one layer and not in another."""
    if any(not is_empty(config.fields.get(field)) for field in ("layers_to_transform", "exclude_modules")):
        return True
    targets = config.fields.get("target_modules")
    if isinstance(targets, str):
        return targets.lower() != ALL_LINEAR
    names = (config.names(field) for field in ("target_modules", "target_parameters", "modules_to_save"))
    return any(part.isdigit() for name in chain(*names) for part in name.split("."))
