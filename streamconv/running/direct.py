"""The engine that moves nothing: tiles are computed where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamconv.adapters.base import Parts
from streamconv.formats.base import CELL_ROWS
from streamconv.planning.plan import Rewrite
from streamconv.running.cell import KeptDelta, Watch
from streamconv.running.cells import WeightWork
from streamconv.running.engine import AllTickets
from streamconv.running.workers import Inline, Ticket, Workers

CPU = torch.device("cpu")


class DirectEngine:
    """Tiles are computed where they lie: on a CPU, or on the `device` to which they were brought.

    `workers` share their cells, of `height` rows each, or more where blocks of a step's scales have more. `defers`:
    that values are finite is known when a weight is finished, and nothing is waited for until then.
    """

    def __init__(
        self,
        workers: Workers | Inline,
        device: torch.device = CPU,
        height: int = CELL_ROWS,
        defers: bool = False,
    ) -> None:
        self._workers, self.device, self._height, self._defers = workers, device, height, defers

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(
        self, step: Rewrite, side: Parts, parts: Sequence[Parts], seed: int, watch: Watch | None = None
    ) -> WeightWork:
        height = max(self._height, step.encoder.cell_rows)
        return WeightWork(step, side, parts, self.device, seed, self._workers, height, self._defers, watch)

    def reduce(self, raw: Tensor, rows: range, works: Sequence[WeightWork]) -> Ticket:
        for work in works:
            work.reduce(raw, rows)
        return AllTickets(())

    def end_reduce(self, works: Sequence[WeightWork]) -> None:
        for work in works:
            work.end_reduce()

    def rewrite(self, raw: Tensor, rows: range, works: Sequence[tuple[WeightWork, Tensor]]) -> Ticket:
        return AllTickets([work.rewrite(raw, rows, out) for work, out in works])

    def finish(self, work: WeightWork) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        return work.finish()
