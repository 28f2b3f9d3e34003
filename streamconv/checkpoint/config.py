"""config.json of a model: the types of its fields, and how it is written anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError

_END = "eos_token_id"


@dataclass(frozen=True, slots=True)
class FieldType:
    """JSON type of a field, in words and as a check."""

    words: str
    fits: Callable[[object], bool]


_TEXT = FieldType("text", lambda value: isinstance(value, str))
_FLAG = FieldType("true or false", lambda value: isinstance(value, bool))
_WHOLE = FieldType("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
_OBJECT = FieldType("an object", lambda value: isinstance(value, dict))
_NAMES = FieldType(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
# Fields that are read here, each of one type, or null (`PreTrainedConfig` of transformers). What is read with a check
# of its own, or goes along as it is, may be of any.
_OF_MODEL: Mapping[str, FieldType] = MappingProxyType(
    {
        "architectures": _NAMES,
        "auto_map": _OBJECT,
        "dtype": _TEXT,
        "id2label": _OBJECT,
        "model_type": _TEXT,
        "text_config": _OBJECT,
        "tie_word_embeddings": _FLAG,
        "torch_dtype": _TEXT,
        "vocab_size": _WHOLE,
    }
)
_OF_PART: Mapping[str, FieldType] = MappingProxyType(
    {name: _OF_MODEL[name] for name in ("model_type", "tie_word_embeddings")}
)
_OF_QUANTIZATION: Mapping[str, FieldType] = MappingProxyType(
    {
        "bnb_4bit_compute_dtype": _TEXT,
        "fmt": _TEXT,
        "format": _TEXT,
        "load_in_4bit": _FLAG,
        "quant_algo": _TEXT,
        "quant_method": _TEXT,
        "sparsity_config": _OBJECT,
    }
)
_QUANTIZATIONS = ("quantization_config", "compression_config")
_LABELS = ("id2label", "label2id")  # whose keys are a user's words


def check_types(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for the first field that is read here and not of its type, `where` naming the file.

    Checked once, where the file is read: later a field may be looked at in hours, when all weights are made.
    """
    for level, rules, path in _typed_levels(config):
        for name, expected in rules.items():
            if (value := level.get(name)) is not None and not expected.fits(value):
                raise CheckpointError(
                    f"{where}: {path}{name} must be {expected.words}, found {shown(value)}; correct it, or download the"
                    " file again"
                )


def _typed_levels(
    config: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, FieldType], str]]:
    """Objects of a config that are read, each with types of its fields and the path before their names."""
    yield config, {**_OF_MODEL, **dict.fromkeys(_QUANTIZATIONS, _OBJECT)}, ""
    for name, part in config.items():
        if isinstance(part, dict) and name not in _LABELS:
            is_quantization = name in (*_QUANTIZATIONS, "quantization")
            rules = _OF_QUANTIZATION if is_quantization else _OF_MODEL if name == "text_config" else _OF_PART
            yield part, rules, f"{shown(name)[1:-1]}."


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config itself and every sub-config (`text_config`) in it."""
    found = [config]
    for value in config.values():
        if isinstance(value, dict):
            found += _levels(value)
    return found


def language_levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The config, and its `text_config` where it has one: the levels that may speak of a language model."""
    text = config.get("text_config")
    return (config, text) if isinstance(text, Mapping) and text else (config,)


def with_end_token(stated: object, token: int) -> list[Any]:
    """Value of `eos_token_id` that has `token` first, and what was `stated` after it."""
    others = stated if isinstance(stated, list) else [] if stated is None else [stated]
    return [token, *(other for other in others if other != token)]


def _forget_quantization(level: dict[str, Any]) -> None:
    for key in _QUANTIZATIONS:
        level.pop(key, None)
    if isinstance(level.get("quantization"), dict):  # MLX's
        del level["quantization"]


def edit_config(
    config: Mapping[str, Any],
    *,
    dtype: str | None,
    quantization: Mapping[str, Any] | None,
    untie: bool,
    vocab_size: tuple[int, int] | None,
    end_token: int | None = None,
    architecture: str | None = None,
    labels: int | None = None,
    quantization_keys: Sequence[str] = ("quantization_config",),
    keeps_quantization: bool = False,
) -> dict[str, Any]:
    """config.json of the output: key order and unknown keys stay.

    `dtype` replaces `dtype`/`torch_dtype` wherever one stands; `quantization` are the new settings, which stand under
    `quantization_keys`, None removes them at every level; `vocab_size` is (old, new) rows of the embedding; `end_token`
    is an id that stands first in every `eos_token_id` there is; `architecture` is the class of the output and `labels`
    how many it tells apart, None where they are the base's. `keeps_quantization`: what is said of it elsewhere stays.
    """
    edited = copy.deepcopy(dict(config))
    for level in _levels(edited):
        if not keeps_quantization:
            _forget_quantization(level)
        _set_dtype(level, dtype)
        if untie and "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = False
        if vocab_size is not None and level.get("vocab_size") == vocab_size[0]:
            level["vocab_size"] = vocab_size[1]
    if end_token is not None:
        _set_end(edited, end_token)
    if untie:
        edited["tie_word_embeddings"] = False
    for key in ("_name_or_path", "_model_name_or_path"):
        if edited.get(key):
            edited[key] = ""  # a local path would tell who made it
    if architecture is not None:
        edited["architectures"] = [architecture]
    if labels is not None:
        _set_labels(edited, labels)
    if quantization is not None:
        there = [key for key in (*_QUANTIZATIONS, "quantization") if isinstance(edited.get(key), dict)]
        edited |= {key: dict(quantization) for key in there or quantization_keys}
    return edited


def _set_dtype(level: dict[str, Any], dtype: str | None) -> None:
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and isinstance(level.get(key), str):
            level[key] = dtype


def _set_end(config: dict[str, Any], token: int) -> None:
    """Put an end token first wherever one stands, and where none does, into the config itself."""
    levels = [level for level in _levels(config) if level.get(_END) is not None]
    for level in levels:
        level[_END] = with_end_token(level[_END], token)
    if not any(_END in level for level in _levels(config)):
        config[_END] = token


def _set_labels(config: dict[str, Any], labels: int) -> None:
    """Give `config` names of so many labels, as transformers writes them; two without names are its default."""
    names = config.get("id2label")
    if len(names) == labels if isinstance(names, dict) else labels == 2:
        return
    config["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels)}
    config["label2id"] = {f"LABEL_{label}": label for label in range(labels)}
    for key in ("num_labels", "_num_labels"):  # of versions that wrote the number, too
        if key in config:
            config[key] = labels
