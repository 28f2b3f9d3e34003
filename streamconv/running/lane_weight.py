"""A weight in a lane: opened for every output that rewrites it, with the row forms of those that store it otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from streamconv.checkpoint.reader import placed
from streamconv.planning.plan import Access
from streamconv.running.engine import Engine
from streamconv.running.messages import BeginWeight, Finished
from streamconv.running.opened import OpenedWeight
from streamconv.running.sink import Output
from streamconv.running.workers import Ticket


class LaneWeight:
    """Tiles of one weight on their way from a lane's slots to its outputs."""

    def __init__(self, begin: BeginWeight, engine: Engine, outputs: Sequence[Output]) -> None:
        seeds = [outputs[output].plan.options.seed for output in begin.outputs]
        self._opened = OpenedWeight(begin.loaded, engine, seeds)
        self._steps = dict(zip(begin.outputs, begin.loaded.steps, strict=True))
        self._offsets = dict(zip(begin.outputs, begin.offsets, strict=True))
        # What files hold in another order than by rows is reordered when all of it is there.
        self._forms = {
            output: engine.host_buffer(step.encoder.row_offset(step.rows))
            for output, step in self._steps.items()
            if step.encoder.order is not None
        }
        self._tickets: list[Ticket] = []

    def reduce(self, raw: Tensor, rows: range) -> Ticket:
        return self._opened.reduce(raw, rows)

    def rewrite(
        self, raw: Tensor, rows: range, written: Sequence[Tensor]
    ) -> tuple[Ticket, list[tuple[int, Tensor]]]:
        """Hand a tile to the engine: the ticket, and where the bytes will be that outputs can have at once."""
        ready, places = [], []
        for output, step in self._steps.items():
            start, stop = step.encoder.row_offset(rows.start), step.encoder.row_offset(rows.stop)
            if output in self._forms:
                places.append(self._forms[output][start:stop])
            else:
                places.append(placed(written[output], self._offsets[output] + start, stop - start))
                ready.append((output, places[-1]))
        ticket = self._opened.rewrite(raw, rows, places)
        self._tickets.append(ticket)
        return ticket, ready

    def reorder(self, output: int, lines: range, written: Tensor) -> Tensor:
        """The part of `written` to which these lines of an output's file have gone; all tiles are there by then."""
        for ticket in self._tickets:
            ticket.wait()
        order = self._steps[output].encoder.order
        assert order is not None
        piece = written[: len(lines) * order.line_bytes]
        order.to_file(self._forms[output], lines, piece)
        return piece

    def finish(self) -> Mapping[int, Finished]:
        """Side parts that follow the tiles, and sums of what the update kept, by number of the output.

        Where scales and sums of all tiles are needed, waits until they are there; and where an update holds a whole
        weight, lest the next one's be in memory beside it.
        """
        results = {}
        for number, (output, step) in enumerate(self._steps.items()):
            if step.encoder.grid is not None or step.access is Access.WHOLE:
                for ticket in self._tickets:
                    ticket.wait()
            tail, kept = self._opened.finish(number)
            sums = {} if kept is None else {step.name: kept}
            results[output] = Finished(tail, sums, step.name if step.waits else None)
        return results
