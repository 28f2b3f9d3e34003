"""Sinks: where an output's bytes go, in file order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from streamconv.planning.plan import (
    Plan,
    ShardPlan,
)
from streamconv.running.cell import KeptDelta


class Sink(Protocol):
    """Destination of an output's bytes; all calls come from one thread, shard by shard, in file order."""

    def begin(self, shard: ShardPlan) -> None:
        """The bytes that follow belong to `shard`, from where its `start` offset said."""

    def write(self, data: memoryview, release: Callable[[], None]) -> None:
        """Take `data`, which stays as it is until `release` is called, from whatever thread."""

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        """All of a weight, or a chunk of a copied one, has been written; a run could go on from here."""

    def end(self) -> None:
        """The shard is complete."""

    def halt(self) -> None:
        """Nothing more will come, though the shard is not complete."""

    def drain(self) -> None:
        """Return when all that was asked for is done; the last call."""

    def close(self) -> None:
        """Let go of everything, whatever happened."""


@dataclass(frozen=True, slots=True)
class Output:
    """A plan to carry out: every shard named in `starts`, each from the file offset given there."""

    plan: Plan
    starts: Mapping[str, int]
    open_sink: Callable[[], Sink]
