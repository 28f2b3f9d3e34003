"""What a pretend GPU was asked to do: launches, bytes, waits, memory, and what a real one would not take."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = str(Path(__file__).parents[2] / "streamconv")
HOST = "host"
_ROUND = 512  # bytes that torch's allocator gives at least


class _Here(threading.local):
    stream = "default"
    is_submitted = False


HERE = _Here()
"""The stream of the calling thread, and whether what it does was submitted to it, not asked of it."""


@dataclass
class Ledger:
    """Counts since the last `reset`. Places are file:line of the package.

    `waits` of the host: (why, place, whether in what was submitted to a stream). `mixes`: operations on tensors of two
    devices. `dtypes`: (operation, dtype). `crossed`: storage that was freed after use on another stream than its own,
    for which neither the host nor its own stream had waited: torch must be told of that. `reciprocals`: divisions by a
    number that is no power of two, for which CUDA multiplies by its reciprocal: other bits than a CPU's. `now` and
    `peak` are bytes on the device. `clock` counts uses of memory; `waited` has, by who waited for which stream, up to
    when.
    """

    waits: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    mixes: Counter[tuple[str, str]] = field(default_factory=Counter)
    dtypes: Counter[tuple[str, str]] = field(default_factory=Counter)
    crossed: Counter[tuple[str, str, tuple[str, ...]]] = field(default_factory=Counter)
    reciprocals: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    moved: int = 0
    now: int = 0
    peak: int = 0
    clock: int = 0
    waited: dict[tuple[str, str], int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def reset(self) -> None:
        with self.lock:
            for table in (self.waits, self.mixes, self.dtypes, self.crossed, self.reciprocals):
                table.clear()
            self.launches = self.moved = 0
            self.peak = self.now

    def wait(self, why: str) -> None:
        with self.lock:
            self.waits[why, place(), HERE.is_submitted] += 1

    def use(self, storage: Storage) -> None:
        """Note that the stream at hand works on `storage`."""
        self.clock += 1
        storage.users[HERE.stream] = self.clock

    def waits_for(self, who: str, stream: str, until: int) -> None:
        """Note that `who`, the host or a stream, goes on only when `stream` has done all `until` then."""
        with self.lock:
            self.waited[who, stream] = max(until, self.waited.get((who, stream), 0))

    def mix(self, what: str) -> None:
        with self.lock:
            self.mixes[what, place()] += 1

    def reciprocal(self) -> None:
        with self.lock:
            self.reciprocals[place()] += 1

    def launch(self, operation: str, dtype: str, nbytes: int) -> None:
        with self.lock:
            self.dtypes[operation, dtype] += 1
            self.launches += 1
            self.moved += nbytes

    @property
    def waits_submitted(self) -> dict[tuple[str, str], int]:
        """Waits in what was submitted: the host meant to go on."""
        return {
            (why, where): count for (why, where, is_submitted), count in self.waits.items() if is_submitted
        }


LEDGER = Ledger()


class Storage:
    """Memory on the device, from the stream that it was allocated on until the last tensor in it is gone."""

    def __init__(self, nbytes: int) -> None:
        self.stream, self.users = HERE.stream, dict[str, int]()
        size, where = -(-max(nbytes, 1) // _ROUND) * _ROUND, place()
        with LEDGER.lock:
            LEDGER.now += size
            LEDGER.peak = max(LEDGER.peak, LEDGER.now)
        weakref.finalize(self, _free, size, self.stream, self.users, where)


def _free(nbytes: int, home: str, users: dict[str, int], where: str) -> None:
    with LEDGER.lock:
        LEDGER.now -= nbytes
        others = {
            stream
            for stream, last in users.items()
            if stream != home and last > max(LEDGER.waited.get((who, stream), 0) for who in (HOST, home))
        }
        if others:
            LEDGER.crossed[where, home, tuple(sorted(others))] += 1


def place() -> str:
    """File and line of the package that the caller was called from; `elsewhere` where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"streamconv{name[len(PACKAGE) :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
