"""The loop that hashes open files, and parts of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

CHUNK_BYTES = 4 * 2**20
"""Bytes that are read at once."""


class Digest(Protocol):
    """A hash in work, such as hashlib makes them."""

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""


def hash_range(
    digest: Digest,
    descriptor: int,
    start: int = 0,
    stop: int | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> int:
    """Add to `digest` the bytes of an open file from `start` to `stop` or its end; return where it ended.

    `on_bytes` is told how many bytes were read, and may raise to end it. Raises OSError.
    """
    size = os.fstat(descriptor).st_size if stop is None else stop
    buffer = memoryview(bytearray(max(1, min(CHUNK_BYTES, size - start + (stop is None)))))
    while stop is None or start < stop:
        count = os.preadv(descriptor, [buffer if stop is None else buffer[: stop - start]], start)
        if not count:
            break
        digest.update(buffer[:count])
        start += count
        on_bytes(count)
    return start
