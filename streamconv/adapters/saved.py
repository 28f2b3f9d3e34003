"""Whole parameters in an adapter (`modules_to_save`), and what becomes of tied embeddings.

Keys: `lm_head.weight` as PEFT saves them; `lm_head.modules_to_save.weight` and
`lm_head.modules_to_save.default.weight` as dumps of a training state dict have them. Beside a LoRA on the head PEFT
also saves `lm_head.base_layer.weight`, the weight trained on, and its bias. After the vocabulary was resized it saves
all that lies below a saved embedding: `lm_head.modules_to_save.weight` again, and the untrained
`lm_head.original_module.weight`, which nothing uses (`peft/utils/save_and_load.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from streamconv.adapters.base import Parameter, Replace
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.source import Base, Source
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(\.default)?\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<rest>weight|bias)")
# PEFT lists both for every classification task; a model has one of them (`peft/peft_model.py`).
_CLASSIFIERS = frozenset({"classifier", "score"})


def read_saved(
    source: Source, base: Base, keys: Collection[str], updated: Collection[str], digests: Mapping[str, str]
) -> tuple[tuple[Replace, ...], frozenset[str]]:
    """Replacements among `keys`, which no update has taken, and those keys that only repeat them.

    `updated` are the parameters with updates, `digests` those of every tensor's bytes. Keys that are neither are
    left for the caller to refuse. Raises AdapterError for a replacement that does not fit the base.
    """
    names = _saved_names(source.config, base)
    found: dict[str, Replace] = {}
    repeated = set()
    for key in keys:
        parameter = _parameter(key, names, updated)
        if parameter is None:
            continue
        tensor = source.tensors[key]
        if parameter in found:
            if not _are_equal(found[parameter].tensor, tensor, digests):
                raise AdapterError(
                    f"{source.location}: {parameter} is saved twice, the second time as {key}, and the two differ;"
                    " remove the one that was not trained"
                )
            repeated.add(key)
            continue
        is_base_layer = _BASE_LAYER.fullmatch(key) is not None
        if parameter in updated and not is_base_layer:
            raise AdapterError(f"{source.location}: {key} replaces {parameter}, which also has an update")
        _check_shape(tensor, base.get(parameter, tensor.name), is_base_layer)
        found[parameter] = Replace(parameter, tensor)
    for key in keys:
        original = _ORIGINAL.fullmatch(key)
        if original is not None and f"{original['module']}.{original['rest']}" in found:
            repeated.add(key)
    return tuple(found.values()), frozenset(repeated)


def check_saved(config: AdapterConfig, base: Base, replaces: Iterable[Replace]) -> None:
    """Raise AdapterError for an entry of modules_to_save that has no tensor in the file."""
    found = [replace.parameter for replace in replaces]
    for name in config.names("modules_to_save"):
        if any(_is_inside(parameter, (name,)) for parameter in found):
            continue
        in_base = any(_is_inside(parameter, (name,)) for parameter in base.parameters)
        if name in _CLASSIFIERS and not in_base and found:
            continue
        raise AdapterError(
            f"{config.name}: modules_to_save lists {name!r}, but the adapter holds no tensor of it; the file"
            " is not complete, or the name is wrong"
        )


def settle_tie(
    base: Base,
    config: AdapterConfig,
    replaces: tuple[Replace, ...],
    updated: Collection[str],
    digests: Mapping[str, str],
) -> tuple[tuple[Replace, ...], bool]:
    """The replacements to carry out, and whether embedding and head part ways.

    Equal replacements of both are one, of the embedding, and the tie holds; a head that the base stores all the
    same is replaced too, or loaders would find two that differ. Any other change to either is a
    change to that one alone: PEFT's live model keeps two tensors then, although its own merge writes both
    changes into the shared one.
    """
    tie = base.tie
    if tie is None:
        return replaces, False
    saved = {replace.parameter: replace.tensor for replace in replaces if replace.parameter not in updated}
    embedding, head = saved.get(tie.embedding), saved.get(tie.head)
    if embedding is not None and head is not None and _are_equal(embedding, head, digests):
        if tie.head in base.parameters:
            return replaces, False
        return tuple(replace for replace in replaces if replace.parameter != tie.head), False
    if (embedding is None) != (head is None) and config.flag("ensure_weight_tying"):
        there, missing = (tie.head, tie.embedding) if embedding is None else (tie.embedding, tie.head)
        raise AdapterError(
            f"{config.name}: ensure_weight_tying is set and {there} is saved, but {missing} is not; the file"
            " is not complete"
        )
    touched = {replace.parameter for replace in replaces} | set(updated)
    return replaces, not touched.isdisjoint({tie.embedding, tie.head})


def _saved_names(config: AdapterConfig, base: Base) -> tuple[str, ...]:
    """modules_to_save; under ensure_weight_tying PEFT saves the tied partner too and does not list it."""
    names = config.names("modules_to_save")
    if base.tie is None or not config.flag("ensure_weight_tying"):
        return names
    pair = (base.tie.embedding, base.tie.head)
    if any(_is_inside(parameter, names) for parameter in pair):
        names += tuple(parameter.rpartition(".")[0] for parameter in pair)
    return names


def _parameter(key: str, names: tuple[str, ...], updated: Collection[str]) -> str | None:
    """The parameter that `key` replaces; None if it is no replacement."""
    if _ORIGINAL.fullmatch(key):
        return None
    spelled = _SAVED.fullmatch(key)
    if spelled:
        return f"{spelled['module']}.{spelled['rest']}"
    under = _BASE_LAYER.fullmatch(key)
    if under:
        is_adapted = f"{under['module']}.weight" in updated
        return f"{under['module']}.{under['rest']}" if is_adapted else None
    return key if _is_inside(key, names) else None


def _is_inside(parameter: str, names: tuple[str, ...]) -> bool:
    """Whether it belongs to a module that PEFT would take for one of `names`: by the end of its path."""
    parts = parameter.split(".")
    return any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts)))


def _check_shape(tensor: StoredTensor, parameter: Parameter, is_base_layer: bool) -> None:
    """A saved module may have more or fewer rows (a resized vocabulary), nothing else."""
    if tensor.shape == parameter.shape:
        return
    if is_base_layer:
        raise UnsupportedError(
            f"{tensor.name} has shape {list(tensor.shape)} and {parameter.name} of the base"
            f" {list(parameter.shape)}: the vocabulary was resized in training, which is not supported yet"
            " beside a LoRA of the same weight; resize the base and save it first"
        )
    if (
        not parameter.shape
        or len(tensor.shape) != len(parameter.shape)
        or tensor.shape[1:] != parameter.shape[1:]
    ):
        raise AdapterError(
            f"{tensor.name} has shape {list(tensor.shape)}, which cannot replace {parameter.name} of the"
            f" base, {list(parameter.shape)}"
        )


def _are_equal(one: StoredTensor, other: StoredTensor, digests: Mapping[str, str]) -> bool:
    return (one.dtype, one.shape, digests[one.name]) == (other.dtype, other.shape, digests[other.name])
