"""The engine of a CPU: tiles are computed where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamconv.planning.plan import Rewrite
from streamconv.running.cells import KeptDelta, WeightWork
from streamconv.running.engine import AllTickets
from streamconv.running.workers import Ticket, Workers


class CpuEngine:
    """Tiles are computed where they lie, by threads that share their cells."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(
        self, step: Rewrite, side: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], seed: int
    ) -> WeightWork:
        return WeightWork(step, side, parts, torch.device("cpu"), seed, self._workers)

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
