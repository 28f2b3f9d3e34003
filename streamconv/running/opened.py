"""A weight, opened: all that the work on it needs beside its tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.planning.plan import (
    Access,
    Rewrite,
)
from streamconv.running.cells import KeptDelta, WeightWork
from streamconv.running.engine import Engine
from streamconv.running.messages import BeginWeight
from streamconv.running.sink import Output
from streamconv.running.workers import Ticket


def begin_weight(reader: TensorReader, steps: Mapping[int, Rewrite]) -> BeginWeight:
    """All that the work on a weight needs beside its tiles, every tensor read once."""
    weight = next(iter(steps.values())).weight
    side = {role: reader.load(part) for role, part in weight.parts.items() if role != weight.decoder.main}
    loaded: dict[StoredTensor, Tensor] = {}

    def load(part: StoredTensor) -> Tensor:
        if part not in loaded:
            loaded[part] = reader.load(part).float()
        return loaded[part]

    parts = {
        output: [{role: load(part) for role, part in update.parts.items()} for update in step.applied]
        for output, step in steps.items()
    }
    return BeginWeight(steps, side, parts)


class OpenWeight:
    """The work on one weight, for every output that rewrites it, and which pass it is in."""

    def __init__(self, begin: BeginWeight, engine: Engine, outputs: Sequence[Output]) -> None:
        self._engine = engine
        self._steps = begin.steps
        self._works: dict[int, WeightWork] = {
            output: engine.begin(step, begin.side, begin.parts[output], outputs[output].plan.options.seed)
            for output, step in begin.steps.items()
        }
        # What files hold in another order than by rows is turned when all of it is there.
        self._forms = {
            output: engine.host_buffer(step.encoder.row_offset(step.rows))
            for output, step in begin.steps.items()
            if step.encoder.order is not None
        }
        self._reducing = [
            self._works[output] for output, step in begin.steps.items() if step.access is not Access.ROW
        ]
        self._tickets: list[Ticket] = []

    def reduce(self, raw: Tensor, rows: range) -> Ticket:
        return self._engine.reduce(raw, rows, self._reducing)

    def rewrite(
        self, raw: Tensor, rows: range, written: Sequence[Tensor]
    ) -> tuple[Ticket, list[tuple[int, Tensor]]]:
        """Hand a tile to the engine: the ticket, and where the bytes will be that outputs can have at once."""
        if self._reducing:
            self._engine.end_reduce(self._reducing)
            self._reducing = []
        pieces, targets = [], []
        for output, step in self._steps.items():
            start, stop = step.encoder.row_offset(rows.start), step.encoder.row_offset(rows.stop)
            if output in self._forms:
                piece = self._forms[output][start:stop]
            else:
                piece = written[output][: stop - start]
                pieces.append((output, piece))
            targets.append((self._works[output], piece))
        ticket = self._engine.rewrite(raw, rows, targets)
        self._tickets.append(ticket)
        return ticket, pieces

    def turn(self, output: int, lines: range, written: Tensor) -> Tensor:
        """The part of `written` to which these lines of an output's file have gone; all tiles are there by then."""
        for ticket in self._tickets:
            ticket.wait()
        order = self._steps[output].encoder.order
        assert order is not None
        piece = written[: len(lines) * order.line_bytes]
        order.to_file(self._forms[output], lines, piece)
        return piece

    def finish(self) -> Mapping[int, tuple[tuple[bytes, ...], Mapping[str, KeptDelta]]]:
        """What comes after the tiles. Where scales and sums of all of them are needed, waits until they are there; and
        where an update holds a whole weight, lest the next one's be in memory beside it.
        """
        results = {}
        for output, step in self._steps.items():
            if step.encoder.grid is not None or step.access is Access.WHOLE:
                for ticket in self._tickets:
                    ticket.wait()
            tail, kept = self._engine.finish(self._works[output])
            results[output] = (tail, {} if kept is None else {step.name: kept})
        return results
