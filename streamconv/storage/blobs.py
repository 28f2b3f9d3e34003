"""Contents as the Hub names them: large files by their SHA-256, small ones by git's id of a blob."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from streamconv.storage.hashing import hash_range

BLOB_ID = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_GIT_DIGITS = 40
GIT, SHA256 = "0" * _GIT_DIGITS, "0" * 64
"""Ids of no content, for `content_id` to take the form of."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: bytes, and what the Hub calls its content (SHA-256 of large files, else git's id)."""

    size: int
    blob: str


def content_id(file: BinaryIO, size: int, like: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Hexadecimal id of the content of `file`, of `size` bytes, in the form of the id `like`: SHA-256, or git's.

    Reads from the start; `on_bytes` is told how many bytes were read, and may raise to end it.
    """
    is_git = len(like) == _GIT_DIGITS
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if is_git else hashlib.sha256()
    hash_range(digest, file.fileno(), on_bytes=on_bytes)
    return digest.hexdigest()
