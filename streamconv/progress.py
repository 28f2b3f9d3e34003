"""Progress of what is under way, for bars and scripts: bytes done, memory used, and the wish to stop."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class OnProgress(Protocol):
    """Callback of a run, with bytes done and bytes in all: first with those that an earlier run had done."""

    def __call__(self, done: int, total: int, /) -> None: ...


OnBytes = Callable[[int], None]
"""Called with how many more bytes are done."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn in what is under way: the phase `name` begins, such as `write`; or, with `nbytes`, the file `name` of the
    output is complete, of so many bytes.
    """

    name: str
    nbytes: int | None = None


OnTurn = Callable[[Turn], None]
"""Called at each turn, from whichever thread it is in."""


def unnoticed(turn: Turn) -> None:
    """The turns that nobody watches."""
    del turn


def quiet(done: int, total: int) -> None:
    """The progress that nobody watches."""
    del done, total


@dataclass(slots=True)
class StopRequest:
    """Set by a signal handler; the run ends at the next boundary."""

    signal_number: int | None = None


class Meter:
    """Counts output bytes and samples memory while a run goes on; with `pinned` as for `anonymous_bytes`.

    `on_turn` is told by whoever has the meter.
    """

    def __init__(
        self, total: int, on_progress: OnProgress, pinned: bool = False, on_turn: OnTurn = unnoticed
    ) -> None:
        self._total, self._on_progress, self._pinned = total, on_progress, pinned
        self.on_turn = on_turn
        self._done = 0
        self._before = anonymous_bytes(pinned)
        self.peak = 0

    def start(self, done: int) -> None:
        self._done = done
        self._on_progress(self._done, self._total)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self.peak = max(self.peak, anonymous_bytes(self._pinned) - self._before)
        self._on_progress(self._done, self._total)


def anonymous_bytes(pinned: bool = False) -> int:
    """Anonymous memory of this process now (RssAnon): what it holds, without pages of files it has read.

    With `pinned`, for a run on a GPU, shared memory (RssShmem) counts as well: what CUDA pins is of that kind. 0 where
    the system does not say.
    """
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0
    kinds = rb"RssAnon|RssShmem" if pinned else rb"RssAnon"
    return sum(int(found) * 1024 for found in re.findall(rb"(?:" + kinds + rb"):\s+(\d+) kB", status))
