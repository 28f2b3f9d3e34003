"""Order in which the steps of one or several outputs are carried out, so that what they share is read once.

Each output is a file order of its own, which must be kept. Outputs of one base go through its weights in nearly the
same order: the one whose next weight comes first has the turn, and all whose next weight it is go along. Where
orders differ, or outputs were interrupted at different places, a weight is read again: slower, and never wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.types import StoredTensor
from streamconv.planning.plan import Access, Copy, Plan, Rewrite, ShardPlan, Step
from streamconv.storage.base import SourceFile


@dataclass(frozen=True, slots=True)
class Begin:
    """The shard begins."""

    shard: ShardPlan


@dataclass(frozen=True, slots=True)
class End:
    """The shard is complete."""


@dataclass(frozen=True, slots=True)
class Todo:
    """A step whose bytes begin at `offset` of the file, and of which an earlier run wrote `done` (a Copy's; else 0)."""

    step: Step
    done: int = 0
    offset: int = 0

    @property
    def source(self) -> tuple[StoredTensor, int] | None:
        """Tensor that is read in tiles, and the byte to begin at; None if nothing is."""
        match self.step:
            case Copy(_, tensor):
                return tensor, self.done
            case Rewrite(_, weight):
                return weight.parts[weight.decoder.main], 0
            case _:
                return None


class Cursor:
    """The shards of one output that are still to be produced; lanes take them in turn."""

    def __init__(self, plan: Plan, starts: Mapping[str, int]) -> None:
        self._starts = starts
        self._shards = iter([shard for shard in plan.shards if shard.name in starts])
        self._lock = threading.Lock()

    def events(self) -> Iterator[Begin | Todo | End]:
        """Events of a shard from where it starts, then of the next that no other lane has taken."""
        while (shard := self._take()) is not None:
            start = self._starts[shard.name]
            yield Begin(shard)
            for placed in shard.steps:
                if start < placed.offset + placed.nbytes:
                    done = max(0, start - placed.offset)
                    assert not done or isinstance(placed.step, Copy), (
                        "a run goes on from a weight's beginning"
                    )
                    yield Todo(placed.step, done, placed.offset)
            yield End()

    def _take(self) -> ShardPlan | None:
        with self._lock:
            return next(self._shards, None)


def walk(cursors: Sequence[Cursor]) -> Iterator[Mapping[int, Begin | Todo | End]]:
    """Events to carry out next, by number of output: one of one output, or the reading of one tensor for several."""
    if len(cursors) == 1:
        for event in cursors[0].events():
            yield {0: event}
        return
    ahead = [_Ahead(cursor) for cursor in cursors]
    while waiting := {number: one for number, one in enumerate(ahead) if one.event is not None}:
        turn = _turn(waiting)
        yield {number: ahead[number].take() for number in turn}


def units_of(plans: Sequence[Plan], starts: Sequence[Mapping[str, int]]) -> list[frozenset[SourceFile]]:
    """Files of the base that each unit of `walk` reads, in its order, where that is any."""
    cursors = [Cursor(plan, start) for plan, start in zip(plans, starts, strict=True)]
    return [files for unit in walk(cursors) if (files := files_read(unit))]


def files_read(unit: Mapping[int, Begin | Todo | End]) -> frozenset[SourceFile]:
    """Files of the base that must be there for the events: of parts that lie in several, all of them."""
    files: set[SourceFile] = set()
    for event in unit.values():
        match event:
            case Begin(shard) if shard.same_as is not None:
                files.add(shard.same_as)
            case Todo(Copy(_, tensor)):
                files.add(tensor.file)
            case Todo(Rewrite(_, weight)):
                files.update(part.file for part in weight.parts.values())
    return frozenset(files)


def bytes_read(plans: Sequence[Plan]) -> int:
    """Bytes of the base that a pass for all of `plans` reads; a weight that is read twice counts twice.

    What the calibration pass reads is not among them.
    """
    cursors = [Cursor(plan, {shard.name: len(shard.header) for shard in plan.shards}) for plan in plans]
    return sum(
        _bytes_read([event.step for event in unit.values() if isinstance(event, Todo)])
        for unit in walk(cursors)
    )


def _bytes_read(steps: Sequence[Step]) -> int:
    """Bytes of one tensor that is read for `steps`, and of the parts beside it that those who rewrite it need."""
    rewrites = [step for step in steps if isinstance(step, Rewrite) and not step.calibrated]
    if not rewrites:
        return next((step.tensor.nbytes for step in steps if isinstance(step, Copy)), 0)
    weight = rewrites[0].weight
    # A row form is held from one pass to the next.
    again = weight.decoder.order is None and any(step.access is not Access.ROW for step in rewrites)
    main = weight.parts[weight.decoder.main].nbytes
    return sum(part.nbytes for part in weight.parts.values()) + again * main


class _Ahead:
    """An output's events with a look at the next."""

    def __init__(self, cursor: Cursor) -> None:
        self._events = cursor.events()
        self.event = next(self._events, None)

    def take(self) -> Begin | Todo | End:
        event, self.event = self.event, next(self._events, None)
        assert event is not None
        return event

    @property
    def source(self) -> tuple[StoredTensor, int] | None:
        return self.event.source if isinstance(self.event, Todo) else None


def _turn(waiting: Mapping[int, _Ahead]) -> list[int]:
    """Outputs whose events come next: one that reads nothing, else the readers of what lies first in the base."""
    sources = {}
    for number, one in waiting.items():
        if one.source is None:
            return [number]
        sources[number] = one.source
    first = min(sources.values(), key=lambda source: _place(source[0]))
    return [number for number, source in sources.items() if source == first]


def _place(tensor: StoredTensor) -> tuple[str, int]:
    return tensor.file.path, tensor.offset
