"""A weight, opened: the one place that loads what the work on it needs beside its tiles, and begins its passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from streamconv.adapters.base import Parts
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.formats.base import Weight
from streamconv.formats.rows import StoredRows
from streamconv.planning.plan import Access, Rewrite
from streamconv.running.cell import KeptDelta, Watch
from streamconv.running.direct import CPU, DirectEngine
from streamconv.running.engine import Engine
from streamconv.running.workers import Ticket


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """Tensors of one weight beside its tiles, for all `steps` that rewrite it.

    `side` are the base's parts other than the main one, as they are stored; `parts`, for each step, what is applied,
    float32, one mapping each. Tensors that several of them want are there once.
    """

    steps: Sequence[Rewrite]
    side: Parts
    parts: Sequence[Sequence[Parts]]


def load_weight(reader: TensorReader, steps: Sequence[Rewrite], on: torch.device = CPU) -> LoadedWeight:
    """Read what `steps` of one weight need beside its tiles, every tensor once, to the device `on`."""
    loaded: dict[StoredTensor, Tensor] = {}

    def load(part: StoredTensor) -> Tensor:
        if part not in loaded:
            loaded[part] = reader.load(part).float().to(on)
        return loaded[part]

    return LoadedWeight(
        steps,
        load_side(reader, steps[0].weight, on),
        [
            [{role: load(part) for role, part in update.parts.items()} for update in step.applied]
            for step in steps
        ],
    )


def load_side(reader: TensorReader, weight: Weight, on: torch.device = CPU) -> Parts:
    """Parts of a weight other than the main one, by role, on the device `on`."""
    main = weight.decoder.main
    return {role: reader.load(part).to(on) for role, part in weight.parts.items() if role != main}


class OpenedWeight:
    """Work on one weight for every step that rewrites it, and which pass it is in.

    `works` are in the order of the steps; seeds and watches belong to them. Nothing of `loaded` is held but by these.
    """

    def __init__(
        self,
        loaded: LoadedWeight,
        engine: Engine,
        seeds: Sequence[int],
        watches: Sequence[Watch | None] = (),
    ) -> None:
        self._engine = engine
        self.works = [
            engine.begin(step, loaded.side, parts, seed, watch)
            for step, parts, seed, watch in zip_longest(loaded.steps, loaded.parts, seeds, watches)
        ]
        pairs = zip(loaded.steps, self.works, strict=True)
        self._reducing = [work for step, work in pairs if step.access is not Access.ROW]

    def learn(self, tiles: Iterable[tuple[range, Tensor]]) -> None:
        """Have the first pass, over `tiles`, where a step asks for one; else none is read."""
        if self._reducing:
            for rows, raw in tiles:
                self.reduce(raw, rows).wait()
            self.end_reduce()

    def reduce(self, raw: Tensor, rows: range) -> Ticket:
        """First pass over a tile, for the steps that ask for one."""
        return self._engine.reduce(raw, rows, self._reducing)

    def end_reduce(self) -> None:
        """Conclude the first pass; after that, and where there is none, do nothing."""
        if self._reducing:
            self._engine.end_reduce(self._reducing)
            self._reducing = []

    def rewrite(self, raw: Tensor, rows: range, written: Sequence[Tensor]) -> Ticket:
        """Second pass over a tile: each step's bytes go to its place in `written`, some time before the ticket."""
        self.end_reduce()
        return self._engine.rewrite(raw, rows, list(zip(self.works, written, strict=True)))

    def finish(self, number: int) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        """Parts after the main one and what survived of the update, of the step of that number."""
        return self._engine.finish(self.works[number])


def open_weight(
    reader: TensorReader,
    steps: Sequence[Rewrite],
    engine: DirectEngine,
    tiles: Iterable[tuple[range, Tensor]],
    seed: int = 0,
    watches: Sequence[Watch | None] = (),
) -> OpenedWeight:
    """The weight that `steps` rewrite, ready for the second pass; `tiles` are read if one of them needs a first."""
    loaded = load_weight(reader, steps, engine.device)
    opened = OpenedWeight(loaded, engine, [seed] * len(steps), watches)
    opened.learn(tiles)
    return opened


def read_tiles(
    stored: StoredRows, rows: range, height: int, on: torch.device = CPU
) -> Iterator[tuple[range, Tensor]]:
    """Stored bytes of `rows`, `height` of them at a time, on the device `on`; the next tile overwrites them."""
    buffer: Tensor | None = None
    for first in range(rows.start, rows.stop, height):
        tile = range(first, min(first + height, rows.stop))
        nbytes = stored.nbytes(tile)
        buffer = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer
        raw = buffer[:nbytes]
        stored.read_into(tile, raw)
        yield tile, raw.to(on)
