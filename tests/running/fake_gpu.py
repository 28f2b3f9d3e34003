"""A GPU without one: streams that run as early or as late as events allow, on the CPU.

What is submitted is kept, and done when the host waits for it; `eager` streams do it as soon as what they wait for is
done. Over all choices of eager streams, work that nothing orders is done in either order, so that a wait that is
missing gives wrong bytes in one of them.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from streamconv.running.streams import Event

T = TypeVar("T")
COPY_IN, COMPUTE, COPY_OUT = "copy in", "compute", "copy out"  # in the order in which the engine opens them
HOST = "host"
NAMES = (COPY_IN, COMPUTE, COPY_OUT)
SCHEDULES = [frozenset(chosen) for count in range(4) for chosen in itertools.combinations(NAMES, count)]
EAGER = frozenset(NAMES)


@dataclass(eq=False)
class FakeEvent:
    stream: FakeStream
    passed: bool = False

    def synchronize(self) -> None:
        gpu = self.stream.gpu
        with gpu.lock:
            if (HOST, self.stream.name) not in gpu.forgets:
                self.stream.run_to(self)


@dataclass(frozen=True)
class _Wait:
    event: FakeEvent


@dataclass(eq=False)
class FakeStream:
    gpu: FakeGpu
    name: str
    pending: deque[Callable[[], None] | _Wait | FakeEvent] = field(default_factory=deque)

    def submit(self, work: Callable[[], None]) -> None:
        self._append(work)

    def ask(self, work: Callable[[], T]) -> T:
        return work()

    def record(self) -> Event:
        event = FakeEvent(self)
        self._append(event)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        if (self.name, event.stream.name) not in self.gpu.forgets:
            self._append(_Wait(event))

    def run_to(self, event: FakeEvent) -> None:
        while not event.passed:
            self._step()

    def run_freely(self) -> bool:
        """Go on to the first event that has not passed; whether anything was done."""
        before = len(self.pending)
        while self.pending and not (isinstance(first := self.pending[0], _Wait) and not first.event.passed):
            self._step()
        return len(self.pending) != before

    def _append(self, what: Callable[[], None] | _Wait | FakeEvent) -> None:
        with self.gpu.lock:
            self.pending.append(what)
            eager = [stream for stream in self.gpu.streams if stream.name in self.gpu.eager]
            while sum(stream.run_freely() for stream in eager):
                pass

    def _step(self) -> None:
        match self.pending.popleft():
            case _Wait(event):
                event.stream.run_to(event)
            case FakeEvent() as event:
                event.passed = True
            case work:
                work()


@dataclass(eq=False)
class FakeGpu:
    """`forgets` are waits that are not done, as (who, for whom). See Gpu."""

    name: str = "cuda:0"
    eager: frozenset[str] = EAGER
    forgets: frozenset[tuple[str, str]] = frozenset()
    torch: torch.device = field(default_factory=lambda: torch.device("cpu"))
    streams: list[FakeStream] = field(default_factory=list)
    given_back: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    _names: Iterator[str] = field(default_factory=lambda: iter(NAMES))

    def stream(self) -> FakeStream:
        self.streams.append(FakeStream(self, next(self._names)))
        return self.streams[-1]

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def upload(self, host: Tensor) -> Tensor:
        return host.clone()

    def give_back(self) -> None:
        self.given_back += 1
