"""Messages between the threads of a lane, the slots they carry, and the queues they pass through."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from streamconv.formats.base import Constant
from streamconv.planning.plan import SideParts
from streamconv.running.cell import KeptDelta
from streamconv.running.opened import LoadedWeight
from streamconv.running.schedule import Begin, End
from streamconv.running.workers import Ticket

_POLL_S = 0.1


class LaneClosed(Exception):  # noqa: N818  unwinds the other threads when one has failed or stopped
    pass


T = TypeVar("T")


class Pipe(Generic[T]):
    """A bounded queue whose ends give up when the lane is closed."""

    def __init__(self, size: int, closed: threading.Event) -> None:
        self._queue: queue.Queue[T] = queue.Queue(size)
        self._closed = closed

    def put(self, item: T) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
        raise LaneClosed

    def get(self) -> T:
        while not self._closed.is_set():
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        raise LaneClosed


class Slot:
    """Buffers of one tile: the bytes `read`, and the bytes `written` for each output. Free when all have let go."""

    def __init__(self, read: Tensor, written: Sequence[Tensor], free: Callable[[Slot], None]) -> None:
        self.read, self.written = read, written
        self._free = free
        self._holders = 0
        self._lock = threading.Lock()

    def hold(self, holders: int) -> None:
        self._holders = holders

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            free = not self._holders
        if free:
            self._free(self)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The bytes `raw`, read into `slot`, go to `outputs` as they are."""

    slot: Slot
    raw: Tensor
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BeginWeight:
    """A weight that these outputs rewrite, each by the step of the same place, from that offset of its file on."""

    outputs: tuple[int, ...]
    offsets: tuple[int, ...]
    loaded: LoadedWeight


@dataclass(frozen=True, slots=True)
class Tile:
    """Bytes `raw` of `rows`, in `slot`; `reduces` tells the first pass of a weight that is read twice.

    `copies` are outputs to which the bytes go as they are.
    """

    rows: range
    slot: Slot
    raw: Tensor
    reduces: bool
    copies: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lines:
    """All tiles of the weight have been read, and there is a `slot` for these lines of what an output's file holds."""

    slot: Slot
    output: int
    lines: range


@dataclass(frozen=True, slots=True)
class EndWeight:
    """All tiles of the weight have been read; `copies` as in them."""

    copies: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """A tile handed to the engine: what goes to each output when `ticket` says so."""

    slot: Slot
    ticket: Ticket
    pieces: Sequence[tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class Reduced:
    """Nothing goes anywhere: `slot` is free when `ticket` says so."""

    slot: Slot
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Finished:
    """Parts of a weight after the main one, and its sums; `waits` names the weight where these wait for others."""

    parts: tuple[bytes, ...] = ()
    sums: Mapping[str, KeptDelta] = field(default_factory=dict)
    waits: str | None = None


@dataclass(frozen=True, slots=True)
class WeightDone:
    """Parts of a weight that are left to write, and its sums, for each output that rewrote or copied it."""

    results: Mapping[int, Finished]


@dataclass(frozen=True, slots=True)
class ShardEvent:
    """A shard of an output begins or ends, or a constant tensor of it is due, or parts that waited are."""

    output: int
    event: Begin | End | Constant | SideParts


@dataclass(frozen=True, slots=True)
class Halt:
    """No more will come; `early` if the run was asked to stop before its end."""

    early: bool = False


ToCompute = ShardEvent | Chunk | BeginWeight | Tile | Lines | EndWeight | Halt


ToWriter = ShardEvent | Chunk | Computed | Reduced | WeightDone | Halt
