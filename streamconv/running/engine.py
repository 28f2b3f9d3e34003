"""Engines compute tiles: the seam between the executor and a device. The maths is `cells`', whatever the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from streamconv.adapters.base import Parts
from streamconv.planning.plan import Rewrite
from streamconv.running.cell import KeptDelta, Watch
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Ticket


class Engine(Protocol):
    """Computes tiles in the order given. All calls for one weight come from one thread."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """A uint8 buffer in host memory that the engine can take tiles from and leave results in."""

    def begin(
        self, step: Rewrite, side: Parts, parts: Sequence[Parts], seed: int, watch: Watch | None = None
    ) -> WeightWork:
        """The work on one weight; `side` and `parts` as they were loaded, where tiles come from too."""

    def reduce(self, raw: Tensor, rows: range, works: Sequence[WeightWork]) -> Ticket:
        """First pass over a tile whose bytes are `raw`, a part of a host buffer, which is free after the ticket."""

    def end_reduce(self, works: Sequence[WeightWork]) -> None:
        """Conclude the first pass."""

    def rewrite(self, raw: Tensor, rows: range, works: Sequence[tuple[WeightWork, Tensor]]) -> Ticket:
        """Second pass: each work's bytes for `rows` go to the host buffer beside it, some time before the ticket."""

    def finish(self, work: WeightWork) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        """`WeightWork.finish`; every tile's ticket has been waited for, where what comes of it is needed."""


@dataclass(frozen=True, slots=True)
class AllTickets:
    """Several tickets in one."""

    tickets: Sequence[Ticket]

    def wait(self) -> None:
        for ticket in self.tickets:
            ticket.wait()
