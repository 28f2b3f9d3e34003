"""Workers that compute the cells of a tile: threads that share them, or the thread that asks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from streamconv.formats.base import CELL_ROWS
from streamconv.threads import Future, Pool


class Scratch:
    """Memory of one worker, kept from cell to cell and from weight to weight: a buffer for every role."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, role: str, count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """`count` entries, flat; they hold what the role's last user left there."""
        key = (role, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count]


class Ticket(Protocol):
    """A tile in work."""

    def wait(self) -> None:
        """Return when it is computed; raises what went wrong."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of one tile among the workers, in row order."""

    futures: Sequence[Future[None]]

    def wait(self) -> None:
        for future in self.futures:
            future.result()


DONE: Ticket = Shares(())
"""A ticket of what needs no waiting for."""


class Workers:
    """Threads that share the cells of tiles between them; torch releases the GIL while it computes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.scratch = tuple(Scratch() for _ in range(count))
        self._numbers = itertools.count()
        self._own = threading.local()
        self._pool = Pool(count, "cells", self._take_number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def map(self, work: Callable[[int, range], None], rows: range, height: int = CELL_ROWS) -> None:
        """Have `work` done for all of `rows`; the first error in row order is raised."""
        self.submit(work, rows, height).wait()

    def submit(self, work: Callable[[int, range], None], rows: range, height: int = CELL_ROWS) -> Shares:
        """Have `work(number, part)` called for consecutive parts of `rows`, whole cells of `height` rows each.

        `number` is that of the thread, below `count`: no two calls with the same one run at once.
        """
        count = -(-len(rows) // height)
        share = -(-count // self.count) * height
        parts = [range(first, min(first + share, rows.stop)) for first in range(rows.start, rows.stop, share)]
        return Shares([self._pool.submit(self._call, work, part) for part in parts])

    def alone(self, work: Callable[[int], None]) -> None:
        """Have `work(number)` done by one thread."""
        self._pool.submit(lambda: work(self._own.number)).result()

    def _take_number(self) -> None:
        self._own.number = next(self._numbers)
        # A thread's own setting: what the calling thread set holds for that alone. With more, matrix products are
        # split as the machine's load has it, and their last bits with them.
        torch.set_num_threads(1)

    def _call(self, work: Callable[[int, range], None], part: range) -> None:
        work(self._own.number, part)


class Inline:
    """The calling thread does all of the work, at once: what a GPU is told to do needs no more threads."""

    count = 1

    def __init__(self) -> None:
        self.scratch = (Scratch(),)

    def map(self, work: Callable[[int, range], None], rows: range, height: int = CELL_ROWS) -> None:
        del height
        work(0, rows)

    def submit(self, work: Callable[[int, range], None], rows: range, height: int = CELL_ROWS) -> Shares:
        del height
        work(0, rows)
        return Shares(())

    def alone(self, work: Callable[[int], None]) -> None:
        work(0)
