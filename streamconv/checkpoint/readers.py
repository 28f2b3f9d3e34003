"""Number of threads that read at once: found by trying, because nobody knows what a path is mounted on.

One reader is all that a local disk needs. A network file system or a cloud volume answers each request late and many at
once, so there several readers of the same range are several times as fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from streamconv.threads import Future, Pool

MAX_READERS = 8
PIECE_BYTES = 512 << 10
"""Bytes that a reader takes at least: smaller pieces cost more in calls than reading them at once can gain."""

WINDOW_BYTES = 64 << 20
"""Bytes read before a number of readers is judged."""

# Windows before it is judged again, after it was found to be best.
_SETTLED_WINDOWS = 32
_WORTHWHILE = 1.15


class Readers:
    """Threads that share the pieces of a range. Use as a context manager; belongs to one thread.

    Their number doubles as long as that makes reading at least 15 % faster, else goes back to what was best; from time
    to time it is tried again.
    """

    def __init__(self, most: int = MAX_READERS, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count = 1
        self._most = most
        self._clock = clock
        self._pool = Pool(most, "readers")  # starts no thread before it is used
        self._bytes, self._seconds = 0, 0.0
        self._best = (1, 0.0)  # readers, bytes a second
        self._settled = 0  # windows until the next trial

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def share(self, nbytes: int, read: Callable[[int, int], None]) -> None:
        """Call `read(start, stop)` for parts that make up `nbytes` bytes; the error of the first is raised."""
        began = self._clock()
        pieces = max(1, min(self.count, nbytes // PIECE_BYTES))
        size = -(-nbytes // pieces)
        starts = range(0, nbytes, size) if nbytes else ()
        futures: list[Future[None]] = []
        try:
            for start in starts[1:]:
                futures.append(self._pool.submit(read, start, min(start + size, nbytes)))  # noqa: PERF401  see below
            if nbytes:
                read(0, size)
        finally:
            for future in futures:
                future.exception()  # no thread may write to the buffer any more when this returns
        for future in futures:
            future.result()
        if pieces == self.count:  # small reads say nothing of this number of readers
            self._learn(nbytes, self._clock() - began)

    def _learn(self, nbytes: int, seconds: float) -> None:
        self._bytes += nbytes
        self._seconds += seconds
        if self._bytes < WINDOW_BYTES:
            return
        speed = self._bytes / max(self._seconds, 1e-9)
        self._bytes, self._seconds = 0, 0.0
        if self._settled:
            self._settled -= 1
            self._best = (self.count, speed)
        elif self.count == self._best[0] or speed > _WORTHWHILE * self._best[1]:
            self._best = (self.count, speed)
        else:
            self.count = self._best[0]
            self._settled = _SETTLED_WINDOWS
            return
        if not self._settled:
            self.count = min(2 * self.count, self._most)
