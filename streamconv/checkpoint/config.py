"""config.json of a model as it is written anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config itself and every sub-config (`text_config`) in it."""
    found = [config]
    for value in config.values():
        if isinstance(value, dict):
            found += _levels(value)
    return found


def edit_config(
    config: Mapping[str, Any],
    *,
    dtype: str | None,
    quantization: Mapping[str, Any] | None,
    untie: bool,
    vocab_size: tuple[int, int] | None,
    architecture: str | None = None,
    labels: int | None = None,
) -> dict[str, Any]:
    """config.json of the output: key order and unknown keys stay.

    `dtype` replaces `dtype`/`torch_dtype` wherever one stands; `quantization` is the new
    `quantization_config`, None removes it at every level; `vocab_size` is (old, new) rows of the embedding;
    `architecture` is the class of the output and `labels` how many it tells apart, None where they are the base's.
    """
    edited = copy.deepcopy(dict(config))
    quantization_keys = ("quantization_config", "compression_config")
    for level in _levels(edited):
        for key in quantization_keys:
            level.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and isinstance(level.get(key), str):
                level[key] = dtype
        if untie and "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = False
        if vocab_size is not None and level.get("vocab_size") == vocab_size[0]:
            level["vocab_size"] = vocab_size[1]
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
