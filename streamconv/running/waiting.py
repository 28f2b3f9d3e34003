"""Side parts that wait in memory: of weights in a stack, whose main parts all come first in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamconv.planning.plan import SideParts
from streamconv.running.cell import KeptDelta
from streamconv.running.sink import Sink


class WaitingParts:
    """Side parts that are made for a sink and not yet written, and sums of weights that are so not yet whole."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._parts: dict[str, dict[int, bytes]] = {}
        self._sums: dict[str, KeptDelta] = {}

    def hold(self, name: str, parts: Sequence[bytes]) -> None:
        self._parts[name] = dict(enumerate(parts))

    def take(self, step: SideParts) -> list[bytes]:
        """Parts that are due, in their order."""
        taken = []
        for name in step.weights:
            left = self._parts[name]
            taken.append(left.pop(step.number))
            if not left:
                del self._parts[name]
        return taken

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        """Tell the sink, unless parts wait: a run could not go on from here without them."""
        self._sums |= sums
        if not self._parts:
            told, self._sums = self._sums, {}
            self._sink.boundary(told)
