"""Renamings that match an adapter's names with the base's where the two were saved from different classes.

A renaming is taken only if it gives every key of the adapter a place in the base, no two the same, and if it is the
only one that does; shapes are checked as for any adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.method import Method
from streamconv.adapters.source import BaseParameters, MoeLayout, Renaming, Source, by_key
from streamconv.checkpoint.types import StoredTensor

_HEAD = ("lm_head.", "lm_head.")
_VISION = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_LANGUAGE = ("model.language_model.", "language_model.model.")


def _both_ways(reason: str, *pairs: tuple[str, str]) -> tuple[Renaming, Renaming]:
    return Renaming(reason, pairs), Renaming(reason, tuple((base, trained) for trained, base in pairs))


RENAMINGS = (
    *_both_ways(
        "the one of a headless class such as AutoModel, the other with 'model.' before", _HEAD, ("", "model.")
    ),
    *_both_ways(
        "the one without the prefix 'transformer.', as GPT-2 on the Hub", _HEAD, ("", "transformer.")
    ),
    # transformers 5 renamed vision-language models; files on the Hub keep the names of before.
    *_both_ways(
        "vision-language names before and since transformers 5",
        _LANGUAGE,
        ("lm_head.", "language_model.lm_head."),
        *_VISION,
    ),
    *_both_ways("vision-language names before and since transformers 5", _LANGUAGE, _HEAD, *_VISION),
)


def read_source(
    location: str,
    config: AdapterConfig,
    tensors: Iterable[StoredTensor],
    base: BaseParameters,
    moe: MoeLayout,
    method: Method,
) -> Source:
    """The adapter's tensors in the names of the base. Raises AdapterError for keys that PEFT does not give."""
    by_trained_key = by_key(location, tensors, method.keys)
    found = _renamings(by_trained_key, base, _ends(method))
    if len(found) != 1:  # as they are; what does not fit is refused with the names
        return Source(location, config, by_trained_key, None, moe)
    ((renaming, keys),) = found
    return Source(location, config, keys, renaming, moe)


def _ends(method: Method) -> re.Pattern[str]:
    """Pattern of all that may follow the path of a module or parameter of the base in a key."""
    return re.compile(
        rf"(\.base_layer)*\.({method.keys}(\..+)?|token_adapter\..+|base_layer\.(weight|bias)|modules_to_save\..+"
        r"|original_module\..+)$"
    )


def _renamings(
    tensors: Mapping[str, StoredTensor], base: BaseParameters, ends: re.Pattern[str]
) -> list[tuple[Renaming, Mapping[str, StoredTensor]]]:
    """Renamings that fit, and the tensors by their new keys; none if the keys fit as they are."""
    places = _places(base)

    def has(place: str) -> bool:
        return place in places or base.has_place(place)

    if all(has(ends.sub("", key)) for key in tensors):
        return []
    found: dict[tuple[str, ...], tuple[Renaming, Mapping[str, StoredTensor]]] = {}
    for renaming in RENAMINGS:
        keys = {renaming.to_base(key): tensor for key, tensor in tensors.items()}
        is_reversible = all(renaming.to_trained(renaming.to_base(key)) == key for key in tensors)
        if is_reversible and len(keys) == len(tensors) and all(has(ends.sub("", key)) for key in keys):
            found[tuple(sorted(keys))] = (renaming, MappingProxyType(dict(sorted(keys.items()))))
    return list(found.values())


def _places(base: BaseParameters) -> frozenset[str]:
    """Paths of all parameters of the base, and of all modules that hold some."""
    places: set[str] = set()
    for name in base.names():
        place = name
        while place and place not in places:
            places.add(place)
            place = place.rpartition(".")[0]
    return frozenset(places)
