"""config.json of a model as it is written anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_END = "eos_token_id"


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
    for key in ("quantization_config", "compression_config"):
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
) -> dict[str, Any]:
    """config.json of the output: key order and unknown keys stay.

    `dtype` replaces `dtype`/`torch_dtype` wherever one stands; `quantization` is the new
    `quantization_config`, None removes it at every level; `vocab_size` is (old, new) rows of the embedding; `end_token`
    is an id that stands first in every `eos_token_id` there is; `architecture` is the class of the output and `labels`
    how many it tells apart, None where they are the base's.
    """
    edited = copy.deepcopy(dict(config))
    for level in _levels(edited):
        _forget_quantization(level)
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and isinstance(level.get(key), str):
                level[key] = dtype
        if untie and "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = False
        if vocab_size is not None and level.get("vocab_size") == vocab_size[0]:
            level["vocab_size"] = vocab_size[1]
    if end_token is not None:
        _set_end(edited, end_token)
    if untie:
        edited["tie_word_embeddings"] = False
    if edited.get("_name_or_path"):
        edited["_name_or_path"] = ""  # a local path would tell who made it
    if architecture is not None:
        edited["architectures"] = [architecture]
    if labels is not None:
        _set_labels(edited, labels)
    if quantization is not None:
        edited["quantization_config"] = dict(quantization)
    return edited


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
