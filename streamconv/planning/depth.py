"""The base of an adapter that was trained on repeated layers: a view in which each copy is a layer of its own.

No tensor is stored twice for it. Copies are read from the same place, and whoever sees the view sees a deeper model.
Whether a family's layers are alike wherever they stand is from transformers 5.23, `models/*/configuration_*.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.replication import LAYER, read_ranges
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import AdapterError, CheckpointError, UnsupportedError
from streamconv.formats.base import Weight
from streamconv.planning.base import Base
from streamconv.planning.plan import Depth

_COUNT = "num_hidden_layers"
# Lists of the config with an entry for each layer.
_LISTS = ("layer_types", "no_rope_layers")
# What such a list says of the layers of a family; where the config leaves it out, the layer's number decides.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "arcee",
                "bert",
                "cohere",
                "ernie4_5",
                "falcon",
                "gemma",
                "glm",
                "glm4",
                "granite",
                "granitemoe",
                "helium",
                "llama",
                "mistral",
                "mixtral",
                "nemotron",
                "olmo",
                "olmo2",
                "olmoe",
                "phi",
                "phi3",
                "phimoe",
                "qwen2",
                "qwen3",
                "qwen3_moe",
                "seed_oss",
                "stablelm",
                "starcoder2",
            ),
            (),
        ),
        **dict.fromkeys(
            ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "vaultgemma"),
            ("layer_types",),
        ),
        "smollm3": ("layer_types", "no_rope_layers"),
    }
)
# By these, some layers differ from others by their number: field -> the value with which none does.
_BY_NUMBER: Mapping[str, Any] = MappingProxyType({"mlp_only_layers": [], "decoder_sparse_step": 1})


def deepen(base: Base, config: AdapterConfig) -> Base:
    """`base` with the layers that the adapter of `config` was trained on; itself where those are the base's own.

    Raises AdapterError for ranges that the base does not have, UnsupportedError where a model with copies of its layers
    is not known to be expressible, CheckpointError where config and tensors disagree on the number of layers.
    """
    ranges = read_ranges(config)
    if not ranges:
        return base
    stack, layers = _find_layers(base)
    depth = Depth(len(layers), ranges)
    for start, end in ranges:
        if end > depth.before:
            raise AdapterError(
                f"{config.name}: layer_replication names the layers [{start}, {end}), and {base.index.storage.location}"
                f" has {depth.before}; was the adapter trained on this base?"
            )
    if depth.sources == tuple(range(depth.before)):
        return base
    edited = _edit_config(base, depth)
    weights = {weight.name: weight for weight in _deeper(base, stack, layers, depth.sources)}
    index = replace(base.index, config=MappingProxyType(edited))
    return replace(base, index=index, weights=MappingProxyType(weights), depth=depth)


def _find_layers(base: Base) -> tuple[str, Sequence[Sequence[Weight]]]:
    """The path of the layers, and the weights of each in the base's order."""
    where = base.index.storage.location
    stacks: dict[str, dict[int, list[Weight]]] = {}
    for weight in base.weights.values():
        if match := LAYER.fullmatch(weight.name):
            numbered = stacks.setdefault(match["stack"], {})
            numbered.setdefault(int(match["number"]), []).append(weight)
    if len(stacks) != 1:
        found = f"finds them at {' and at '.join(sorted(stacks))}" if stacks else "finds none"
        raise UnsupportedError(
            f"{where}: layer_replication repeats layers of the base, and looking where PEFT does (layers,"
            f" bert.encoder.layer, h) {found}; such a model cannot have been trained with it"
        )
    ((stack, layers),) = stacks.items()
    count = base.index.config.get(_COUNT)
    if count != len(layers) or sorted(layers) != list(range(len(layers))):
        raise CheckpointError(
            f"{where}: {_COUNT} in config.json is {_found(count)}, and tensors are there for {len(layers)} layers"
            f" up to {stack}.{max(layers)}; layers can be repeated only where the two agree"
        )
    return stack, [layers[number] for number in range(len(layers))]


def _deeper(
    base: Base, stack: str, layers: Sequence[Sequence[Weight]], sources: Sequence[int]
) -> Iterator[Weight]:
    """Weights in the base's order, with all layers, by their new number, where its first one begins."""
    inside = {weight.name for layer in layers for weight in layer}
    placed = False
    for name, weight in base.weights.items():
        if name not in inside:
            yield weight
        elif not placed:
            placed = True
            for number, source in enumerate(sources):
                for each in layers[source]:
                    yield _moved(each, f"{stack}.{source}.", f"{stack}.{number}.")


def _moved(weight: Weight, old: str, new: str) -> Weight:
    """`weight` under another name, and its parts: errors of decoding still name what is stored."""
    parts = {
        role: replace(part, name=new + part.name.removeprefix(old)) for role, part in weight.parts.items()
    }
    return replace(weight, name=new + weight.name.removeprefix(old), parts=MappingProxyType(parts))


def _edit_config(base: Base, depth: Depth) -> dict[str, Any]:
    """config.json of the deeper model. Raises UnsupportedError where copies could become layers of another kind."""
    config, where = dict(base.index.config), base.index.storage.location
    family = str(config.get("model_type"))
    if family not in KINDS:
        raise UnsupportedError(
            f"{where}: the adapter was trained with layer_replication, and whether layers of a {family} model may stand"
            f" at other places is not known; known are {', '.join(KINDS)}"
        )
    for field, neutral in _BY_NUMBER.items():
        if config.get(field) not in (None, neutral):
            raise UnsupportedError(
                f"{where}: {field} in config.json is {shown(config[field])}, so that layers differ by their number;"
                " layer_replication is not supported for such a model"
            )
    windows = ("layer_types",) if config.get("use_sliding_window") else ()
    needed = {*KINDS[family], *windows}
    for field in _LISTS:
        if field in needed or config.get(field) is not None:
            config[field] = _moved_entries(config.get(field), depth, f"{where}: {field} in config.json")
    config[_COUNT] = len(depth.sources)
    return config


def _moved_entries(kinds: object, depth: Depth, what: str) -> list[Any]:
    if not isinstance(kinds, list) or len(kinds) != depth.before:
        raise UnsupportedError(
            f"{what} is {_found(kinds)}, expected a list with an entry for each of the {depth.before} layers, which are"
            " of several kinds, and copies keep theirs; saving the base with transformers 4.53 or later writes the list"
        )
    return [kinds[source] for source in depth.sources]


def _found(value: object) -> str:
    return "missing" if value is None else shown(value)
