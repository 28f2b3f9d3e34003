"""Trained rows of an embedding as a method of their own: row i becomes the adapter's
(`peft/tuners/trainable_tokens/layer.py`); beside another method they are `tokens.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Update
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED
from streamconv.adapters.method import Method
from streamconv.adapters.source import BaseParameters, Source, by_module
from streamconv.adapters.tokens import rows_update
from streamconv.checkpoint.types import StoredTensor

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>trainable_tokens_delta)")
_FIELD = "token_indices"


def read_trainable_tokens(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """One update for every module with trained rows; a tied head's are there twice.

    Raises AdapterError where config and tensors disagree.
    """
    modules = by_module(source, _KEY).items()
    return tuple(
        rows_update(module, tensor, _FIELD, module, source, base)
        for module, parts in modules
        for tensor in parts.values()
    )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del tensors
    found = fields.get(_FIELD)
    return {"tokens": len(found) if isinstance(found, list) else 0}


TRAINABLE_TOKENS = Method(
    label="trainable tokens",
    read=read_trainable_tokens,
    fields=MappingProxyType({**COMMON_FIELDS, "token_indices": USED, "init_weights": NO_EFFECT}),
    keys="trainable_tokens_delta",
    neutral="of no row",
    formula="the trained rows in place of those of W",
    layers=("Embedding",),
    facts=_facts,
)
