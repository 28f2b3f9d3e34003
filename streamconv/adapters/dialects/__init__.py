"""Adapters that other programs than PEFT wrote: their configs and tensors in PEFT's fields and keys."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.adapters import config as peft
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.dialects.base import Dialect
from streamconv.adapters.dialects.gguf import GGUF
from streamconv.adapters.dialects.mlx import MLX
from streamconv.adapters.dialects.unread import refuse_unread
from streamconv.storage.base import Storage


def find_dialect(storage: Storage) -> Dialect | None:
    """The dialect that the adapter in `storage` is written in; None where it is PEFT's own."""
    return next((dialect for dialect in DIALECTS if dialect.recognizes(storage)), None)


def read_config(storage: Storage) -> AdapterConfig:
    """The adapter's config in PEFT's fields, whichever dialect it is in.

    Raises AdapterError where it is broken, UnsupportedError for the forms of FOREIGN.
    """
    dialect = find_dialect(storage)
    if dialect is not None:
        return dialect.read_config(storage)
    refuse_unread(storage)
    return peft.read_config(storage)


# In the order in which they are asked.
DIALECTS: Sequence[Dialect] = (MLX, GGUF)
