"""The engine of a GPU: tiles are brought there, computed and brought back, on a stream each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from streamconv.adapters.base import Parts
from streamconv.memory_errors import is_out_of_memory
from streamconv.planning.devices import Device
from streamconv.planning.plan import DEVICE_TILES, Access, Memory, Rewrite, cell_rows, tile_rows
from streamconv.running.cell import KeptDelta, Watch
from streamconv.running.cells import WeightWork
from streamconv.running.engine import AllTickets
from streamconv.running.streams import Event, Gpu
from streamconv.running.workers import Inline, Ticket

T = TypeVar("T")
_MOST_PATIENCE = 64  # weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Passed:
    """A ticket that is due with an event."""

    event: Event

    def wait(self) -> None:
        self.event.synchronize()


@dataclass(slots=True)
class _Place:
    """Buffers on the device for one tile, and the events after which they may be overwritten."""

    read: Tensor
    written: Sequence[Tensor]
    read_free: Event
    written_free: Event


class CudaEngine:
    """Tiles are brought to a GPU, computed and brought back, on a stream each, three tiles at a time.

        copy in ──loaded──▶ compute ──computed──▶ copy out ──▶ ticket
           ▲───── read_free ───┘ ▲────── written_free ───┘

    The host only submits; it waits in tickets, at a weight's end, and for the first tile of one whose rounding that
    decides. Where memory runs out, everything in flight is waited for, tiles halve, down to a cell each, then come one
    at a time; and what had failed is done again. Weights later they grow again.
    """

    def __init__(self, gpu: Gpu, device: Device, memory: Memory) -> None:
        self._gpu, self._device = gpu, device
        # Of a tile as it is read, and as it is written: now, and at most.
        self._tile_bytes = self._most = (memory.buffer, memory.written_buffer)
        self._count = DEVICE_TILES
        self._weights, self._patience = 0, 1  # that passed since memory ran out, and that are to pass
        self._copy_in, self._compute, self._copy_out = gpu.stream(), gpu.stream(), gpu.stream()
        self._inline = Inline()
        self._places: list[_Place] = []
        self._turn = 0

    def host_buffer(self, nbytes: int) -> Tensor:
        return self._gpu.host_buffer(nbytes)

    def begin(
        self, step: Rewrite, side: Parts, parts: Sequence[Parts], seed: int, watch: Watch | None = None
    ) -> WeightWork:
        def upload(tensors: Parts) -> Parts:
            return {role: self._gpu.upload(tensor) for role, tensor in tensors.items()}

        def begin() -> WeightWork:
            there = [upload(update) for update in parts]
            height = cell_rows(self._device, step)
            device, workers = self._gpu.torch, self._inline
            return WeightWork(step, upload(side), there, device, seed, workers, height, True, watch)

        return self._within_memory(lambda: self._compute.ask(begin), [step])

    def reduce(self, raw: Tensor, rows: range, works: Sequence[WeightWork]) -> Ticket:
        # One work after the other: what one has taken in must not be repeated for want of memory in the next.
        return AllTickets(
            [self._in_pieces(raw, rows, [work.step], partial(self._send_reduce, work)) for work in works]
        )

    def end_reduce(self, works: Sequence[WeightWork]) -> None:
        self._compute.record().synchronize()
        for work in works:
            if (
                work.step.access is Access.WHOLE
            ):  # a decomposition needs much at once, tiles nothing meanwhile
                self.synchronize()
                self._places.clear()
            self._compute.ask(work.conclude_updates)
            self._within_memory(partial(self._compute.ask, work.know_scales), [work.step])

    def rewrite(self, raw: Tensor, rows: range, works: Sequence[tuple[WeightWork, Tensor]]) -> Ticket:
        steps = [work.step for work, _ in works]
        return self._in_pieces(raw, rows, steps, partial(self._send_rewrite, works, rows))

    def finish(self, work: WeightWork) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        self._compute.record().synchronize()
        finished = self._within_memory(lambda: self._compute.ask(work.finish), [work.step])
        self._grow()
        return finished

    def synchronize(self) -> None:
        """Return when all that was submitted is done."""
        for stream in (self._copy_in, self._compute, self._copy_out):
            stream.record().synchronize()

    # -- one piece of a tile -------------------------------------------------------------------------------

    def _send_reduce(self, work: WeightWork, part: Tensor, piece: range, place: _Place) -> Ticket:
        """Have `work` take in the rows `piece`, whose bytes are `part` in host memory."""
        there, loaded = self._load(part, place)
        self._compute.submit(lambda: work.reduce(there, piece))
        place.read_free = self._compute.record()
        return _Passed(loaded)

    def _send_rewrite(
        self,
        works: Sequence[tuple[WeightWork, Tensor]],
        rows: range,
        part: Tensor,
        piece: range,
        place: _Place,
    ) -> Ticket:
        """Have `piece` rewritten, whose bytes are `part` in host memory; results go beside the rest of `rows`."""
        targets = [_part(out, work.step.encoder.row_offset, rows, piece) for work, out in works]
        results = [written[: target.numel()] for written, target in zip(place.written, targets, strict=False)]

        def compute() -> None:
            for (work, _), result in zip(works, results, strict=True):
                work.rewrite(there, piece, result)

        def copy_out() -> None:
            for result, target in zip(results, targets, strict=True):
                self._gpu.copy(result, target)

        there, loaded = self._load(part, place)
        if unsettled := [work for work, _ in works if not work.is_settled]:
            loaded.synchronize()
            for work in unsettled:  # once a weight: the host is told what becomes of its scales
                self._compute.ask(partial(work.settle, there, piece))
        self._compute.wait(place.written_free)
        self._compute.submit(compute)
        place.read_free = computed = self._compute.record()
        self._copy_out.wait(computed)
        self._copy_out.submit(copy_out)
        place.written_free = self._copy_out.record()
        return _Passed(place.written_free)

    def _load(self, part: Tensor, place: _Place) -> tuple[Tensor, Event]:
        """Bring `part` to `place`; what is computed from now on finds it there."""
        there = place.read[: part.numel()]
        self._copy_in.wait(place.read_free)
        self._copy_in.submit(lambda: self._gpu.copy(part, there))
        loaded = self._copy_in.record()
        self._compute.wait(loaded)
        return there, loaded

    # -- memory of the device ------------------------------------------------------------------------------

    def _in_pieces(self, raw: Tensor, rows: range, steps: Sequence[Rewrite], send: _Send) -> Ticket:
        """`send` all of `rows`, whose bytes are `raw`, in pieces that there is memory for."""
        tickets: list[Ticket] = []
        first = rows.start
        while first < rows.stop:
            attempt = partial(self._send_piece, raw, rows, first, steps, send)
            first, ticket = self._within_memory(attempt, steps)
            tickets.append(ticket)
        return AllTickets(tickets)

    def _send_piece(
        self, raw: Tensor, rows: range, first: int, steps: Sequence[Rewrite], send: _Send
    ) -> tuple[int, Ticket]:
        """Send the piece that begins at row `first`; returns the row at which it ends, and its ticket."""
        read, written = self._tile_bytes
        count = min(tile_rows(step, read, self._height(step), written) for step in steps)
        piece = range(first, min(first + count, rows.stop))
        part = _part(raw, steps[0].weight.decoder.row_offset, rows, piece)
        return piece.stop, send(part, piece, self._next_place(steps))

    def _next_place(self, steps: Sequence[Rewrite]) -> _Place:
        sizes = self._at_least(self._tile_bytes, steps)
        places = self._places
        is_short = len(places) < self._count or len(places[0].written) < len(steps)
        if is_short or any(place < size for place, size in zip(_sizes(places[0]), sizes, strict=True)):
            self._allocate(sizes, len(steps))
        self._turn = (self._turn + 1) % len(self._places)
        return self._places[self._turn]

    def _allocate(self, sizes: tuple[int, int], outputs: int) -> None:
        self.synchronize()
        self._places.clear()
        read, written = sizes

        def allocate() -> list[Tensor]:
            each = (read, *[written] * outputs)
            return [torch.empty(size, dtype=torch.uint8, device=self._gpu.torch) for size in each]

        buffers = [self._compute.ask(allocate) for _ in range(self._count)]
        # The allocator may give what was freed by work that is still to be done on this stream, and on no other.
        now = self._compute.record()
        self._places = [_Place(read, written, now, now) for read, *written in buffers]

    def _within_memory(self, work: Callable[[], T], steps: Sequence[Rewrite]) -> T:
        """Return what `work` answers, repeated with ever less memory for tiles while there is not enough."""
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # whose frames would keep the tensors of the cell
            if not self._shrink(steps):
                raise failed

    def _shrink(self, steps: Sequence[Rewrite]) -> bool:
        """Whether tiles could do with less; if so, their memory is given back."""
        self.synchronize()
        self._places.clear()
        self._gpu.give_back()
        read, written = self._tile_bytes
        halves = self._at_least((read // 2, written // 2), steps)
        if halves[0] < read or halves[1] < written:
            self._tile_bytes = (min(read, halves[0]), min(written, halves[1]))
        elif self._count > 1:
            self._count = 1
        else:
            return False
        self._weights, self._patience = 0, min(2 * self._patience, _MOST_PATIENCE)
        _log.info("out of memory on %s: going on with smaller tiles", self._device.name)
        return True

    def _grow(self) -> None:
        """Take back, a step at a time, what `_shrink` gave: others may have needed the memory for a while only.

        Each time that it runs out, twice as many weights have to pass before the next step.
        """
        if self._count == DEVICE_TILES and self._tile_bytes == self._most:
            return
        self._weights += 1
        if self._weights < self._patience:
            return
        self._weights = 0
        if self._count < DEVICE_TILES:
            self._count = DEVICE_TILES
        else:
            (read, written), most = self._tile_bytes, self._most
            self._tile_bytes = (min(most[0], 2 * read), min(most[1], 2 * written))

    def _height(self, step: Rewrite) -> int:
        return cell_rows(self._device, step)

    def _at_least(self, sizes: tuple[int, int], steps: Sequence[Rewrite]) -> tuple[int, int]:
        """`sizes` of a tile as read and as written, or those of one cell of any of `steps` where these are more."""
        cells = [(step, min(self._height(step), step.rows)) for step in steps]
        read = max(step.weight.decoder.row_offset(rows) for step, rows in cells)
        return max(sizes[0], read), max(sizes[1], *(step.encoder.row_offset(rows) for step, rows in cells))


# Bytes in host memory, their rows, and where they go on the device.
_Send = Callable[[Tensor, range, _Place], Ticket]


def _sizes(place: _Place) -> tuple[int, int]:
    """Bytes of a place's buffer for what is read, and of the one for what is written."""
    return place.read.numel(), place.written[0].numel()


def _part(tile: Tensor, offset: Callable[[int], int], rows: range, piece: range) -> Tensor:
    """The bytes of `piece` among those of `rows`."""
    first = offset(rows.start)
    return tile[offset(piece.start) - first : offset(piece.stop) - first]
