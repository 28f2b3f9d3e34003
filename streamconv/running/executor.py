"""Carries plans out: reader, compute and writer threads with bounded queues of reused buffers between.

    reader ──tiles──▶ compute ──tickets──▶ writer ──▶ Sink

A *slot* is a buffer for what is read of a tile and one for what is written in its place. All slots are allocated
once, before the first read; what bounds memory is their number, not the model. Compute hands tiles to the engine and
does not wait for them: the writer does, in file order. What is copied goes from reader to writer untouched.

A *lane* is one such row of threads. Of one output, several shards are in work at once where there are cores for it,
a lane each. Several outputs (`--also`) share one lane: a tile is read once, and written to every output whose turn it
is for that weight.

What a file holds in another order than by rows (`formats.base.Order`) is computed by rows all the same, into memory for
all of a weight. When that is complete, the file's lines are made of it, in slots of their own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, assert_never

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import ResourceError, Stopped
from streamconv.formats.base import Constant, Weight
from streamconv.formats.rows import StoredRows, runs
from streamconv.planning.plan import (
    SLOTS,
    WEIGHTS_HELD,
    Access,
    Copy,
    Memory,
    Plan,
    Rewrite,
    ShardPlan,
    cell_rows,
    tile_rows,
)
from streamconv.progress import StopRequest
from streamconv.running.cells import KeptDelta, WeightWork
from streamconv.running.engine import Engine, open_engines
from streamconv.running.schedule import Begin, Cursor, End, Todo, walk
from streamconv.running.workers import DONE, Ticket

# How long a stop request may wait for the weight in work to end, so that no work is lost.
GRACE_S = 5.0
_POLL_S = 0.1


class Sink(Protocol):
    """Where an output's bytes go; all calls come from one thread, shard by shard, in file order."""

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


class _Closed(Exception):  # noqa: N818  unwinds the other threads when one has failed or stopped
    pass


T = TypeVar("T")


class _Pipe(Generic[T]):
    """A bounded queue whose ends give up when the lane is closed."""

    def __init__(self, size: int, closed: threading.Event) -> None:
        self._queue: queue.Queue[T] = queue.Queue(size)
        self._closed = closed

    def put(self, item: T) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
        raise _Closed

    def get(self) -> T:
        while not self._closed.is_set():
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        raise _Closed


class _Slot:
    """Buffers of one tile: the bytes `read`, and the bytes `written` for each output. Free when all have let go."""

    def __init__(self, read: Tensor, written: Sequence[Tensor], free: Callable[[_Slot], None]) -> None:
        self.read, self.written = read, written
        self._free = free
        self._holders = 0
        self._lock = threading.Lock()

    def hold(self, holders: int) -> None:
        self._holders = holders

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            free = not self._holders
        if free:
            self._free(self)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The bytes read into `slot` go to `outputs` as they are."""

    slot: _Slot
    nbytes: int
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _BeginWeight:
    """`steps` are those of each output that rewrites the weight, with what their updates read."""

    steps: Mapping[int, Rewrite]
    side: Mapping[str, Tensor]
    parts: Mapping[int, Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Bytes of `rows` in `slot`; `reduces` tells the first pass of a weight that is read twice.

    `copies` are outputs to which the bytes go as they are.
    """

    rows: range
    slot: _Slot
    nbytes: int
    reduces: bool
    copies: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Lines:
    """All tiles of the weight have been read, and there is a `slot` for these lines of what an output's file holds."""

    slot: _Slot
    output: int
    lines: range


@dataclass(frozen=True, slots=True)
class _EndWeight:
    """All tiles of the weight have been read; `copies` as in them."""

    copies: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Computed:
    """A tile handed to the engine: what goes to each output when `ticket` says so."""

    slot: _Slot
    ticket: Ticket
    pieces: Sequence[tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class _Reduced:
    """Nothing goes anywhere: `slot` is free when `ticket` says so."""

    slot: _Slot
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class _WeightDone:
    """The parts after the main one and the sums, for each output that rewrote or copied the weight."""

    results: Mapping[int, tuple[tuple[bytes, ...], Mapping[str, KeptDelta]]]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard of an output begins or ends, or a constant tensor of it is due."""

    output: int
    event: Begin | End | Constant


@dataclass(frozen=True, slots=True)
class _Halt:
    """No more will come; `early` if the run was asked to stop before its end."""

    early: bool = False


_Read = _Shard | _Chunk | _BeginWeight | _Tile | _Lines | _EndWeight | _Halt
_Write = _Shard | _Chunk | _Computed | _Reduced | _WeightDone | _Halt


def run_plans(outputs: Sequence[Output], on_progress: Callable[[int], None], stop: StopRequest) -> None:
    """Produce every output in one pass over their base, which is the same.

    `on_progress` is called, from the calling thread, with the number of output bytes each time some have been
    written. Raises Stopped if `stop` was set; whatever a thread raised is raised here.
    """
    threads = torch.get_num_threads()
    # Cells are shared between workers of one thread each: faster than threads inside every operation on a busy
    # machine, and sums come out the same whatever the number of cores.
    torch.set_num_threads(1)
    memory = outputs[0].plan.memory
    lanes = memory.lanes if len(outputs) == 1 else 1
    try:
        with open_engines(outputs[0].plan.device, memory, lanes) as engines:
            _Run(outputs, memory, engines, stop).run(on_progress)
    finally:
        torch.set_num_threads(threads)


class _Run:
    """All lanes of a run, the first error of any thread, and what has been written."""

    def __init__(
        self, outputs: Sequence[Output], memory: Memory, engines: Sequence[Engine], stop: StopRequest
    ) -> None:
        self.device, self.stop = outputs[0].plan.device, stop
        self.errors: list[BaseException] = []
        self.written: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        cursors = [Cursor(output.plan, output.starts) for output in outputs]
        self.lanes = [
            _Lane(self, outputs, cursors, memory, engine, number) for number, engine in enumerate(engines)
        ]

    def run(self, on_progress: Callable[[int], None]) -> None:
        threads = [thread for lane in self.lanes for thread in lane.threads]
        for thread in threads:
            thread.start()
        try:
            self._report(on_progress, len(threads))
        except BaseException as error:  # of the caller's own function, or Ctrl-C
            self.fail(error)
        finally:  # no thread may outlive the files it works on
            self._join(threads)
        if self.errors:
            raise self._told(self.errors[0])
        if any(lane.halted for lane in self.lanes):
            assert self.stop.signal_number is not None
            raise Stopped("stopped by a signal; run the same command again to go on", self.stop.signal_number)

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)
        for lane in self.lanes:
            lane.closed.set()

    def guarded(self, work: Callable[[], None]) -> None:
        try:
            torch.set_num_threads(1)  # a thread's own setting, as in `Workers`
            work()
        except _Closed:
            pass
        except BaseException as error:  # run() raises it in the calling thread
            self.fail(error)
        finally:
            self.written.put(None)

    def _report(self, on_progress: Callable[[int], None], threads: int) -> None:
        while threads:
            nbytes = self.written.get()
            if nbytes is None:
                threads -= 1
            elif not self.errors:
                on_progress(nbytes)

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C, once more
            self.fail(error)
            for thread in threads:
                thread.join()

    def _told(self, error: BaseException) -> BaseException:
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        told = ResourceError(
            f"{self.device.name} ran out of memory: {str(error).splitlines()[0]} Give it a smaller --max-vram, "
            "free some memory, or use --device cpu, and run again"
        )
        told.__cause__ = error
        return told


class _Lane:
    """Three threads, the slots that go round between them, and the sinks they fill."""

    def __init__(
        self,
        run: _Run,
        outputs: Sequence[Output],
        cursors: Sequence[Cursor],
        memory: Memory,
        engine: Engine,
        number: int,
    ) -> None:
        self.run, self.outputs, self.cursors, self.engine = run, outputs, cursors, engine
        self.memory = memory
        self.halted = False
        self.closed = threading.Event()  # nothing more will be done, and who waits for another thread may go
        self.free: _Pipe[_Slot] = _Pipe(0, self.closed)
        for _ in range(SLOTS):
            read = engine.host_buffer(memory.buffer)
            written = [engine.host_buffer(memory.buffer) for _ in outputs]
            self.free.put(_Slot(read, written, self.free.put))
        # Of small weights, many tiles fit the slots; their side parts and adapters must not pile up.
        self.places: _Pipe[None] = _Pipe(0, self.closed)
        for _ in range(WEIGHTS_HELD):
            self.places.put(None)
        self.to_compute: _Pipe[_Read] = _Pipe(SLOTS, self.closed)
        self.to_writer: _Pipe[_Write] = _Pipe(SLOTS, self.closed)
        suffix = f"-{number}" if memory.lanes > 1 else ""
        self.threads = [
            threading.Thread(target=run.guarded, args=(work,), name=f"streamconv-{name}{suffix}", daemon=True)
            for name, work in (("reader", self.read), ("compute", self.compute), ("writer", self.write))
        ]

    # -- reader thread -------------------------------------------------------------------------------------

    def read(self) -> None:
        with TensorReader() as reader:
            for unit in walk(self.cursors):
                self._read_unit(reader, unit)
            reader.check_unchanged()
        self.to_compute.put(_Halt())

    def _read_unit(self, reader: TensorReader, unit: Mapping[int, Begin | End | Todo]) -> None:
        rewrites: dict[int, Rewrite] = {}
        copies: dict[int, tuple[Copy, int]] = {}
        for output, event in unit.items():
            match event:
                case Begin() | End():
                    self.to_compute.put(_Shard(output, event))
                case Todo(Constant() as step):
                    self.to_compute.put(_Shard(output, step))
                case Todo(Copy() as step, done):
                    copies[output] = (step, done)
                case Todo(Rewrite() as step):
                    rewrites[output] = step
        if rewrites:
            # Tiles of a weight that the file has in another order than by rows are not the file's bytes.
            is_by_rows = next(iter(rewrites.values())).weight.decoder.order is None
            self._read_weight(reader, rewrites, tuple(copies) if is_by_rows else ())
            if is_by_rows:
                return
        if copies:
            step, done = next(iter(copies.values()))
            self._read_copy(reader, step.tensor, done, tuple(copies))

    def _read_copy(
        self, reader: TensorReader, tensor: StoredTensor, done: int, outputs: tuple[int, ...]
    ) -> None:
        for first in range(done, tensor.nbytes, self.memory.buffer):
            nbytes = min(self.memory.buffer, tensor.nbytes - first)
            slot = self.free.get()
            reader.read_into(tensor, first, tensor_bytes(slot.read[:nbytes]))
            reader.drop_cache(tensor, first, nbytes)
            self.to_compute.put(_Chunk(slot, nbytes, outputs))

    def _read_weight(
        self, reader: TensorReader, steps: Mapping[int, Rewrite], copies: tuple[int, ...]
    ) -> None:
        weight = next(iter(steps.values())).weight
        self.places.get()
        self.to_compute.put(_begin(reader, steps))
        height = cell_rows(self.run.device, next(iter(steps.values())).columns)
        rows = min(tile_rows(step, self.memory.buffer, height) for step in steps.values())
        count = next(iter(steps.values())).rows
        twice = any(step.access is not Access.ROW for step in steps.values())
        stored = self._stored_rows(reader, weight)
        for reduces in (True, False) if twice else (False,):
            for first in range(0, count, rows):
                tile = range(first, min(first + rows, count))
                slot, nbytes = self.free.get(), stored.nbytes(tile)
                stored.read_into(tile, slot.read[:nbytes])
                if not reduces:
                    stored.drop_cache(tile)
                self.to_compute.put(_Tile(tile, slot, nbytes, reduces, copies))
        for output, step in steps.items():
            if step.encoder.order is not None:
                for lines in runs(step.encoder.order, self.memory.buffer):
                    self.to_compute.put(_Lines(self.free.get(), output, lines))
        self.to_compute.put(_EndWeight(copies))

    def _stored_rows(self, reader: TensorReader, weight: Weight) -> StoredRows:
        if weight.decoder.order is None:
            return StoredRows(reader, weight)
        slot = self.free.get()
        stored = StoredRows(reader, weight, slot.read)
        self.free.put(slot)
        return stored

    # -- computing thread ----------------------------------------------------------------------------------

    def compute(self) -> None:
        weight: _Weight | None = None
        asked_at: float | None = None
        at_boundary = True
        while True:
            if self.run.stop.signal_number is not None:
                asked_at = asked_at or time.monotonic()
                if at_boundary or time.monotonic() - asked_at > GRACE_S:
                    self.halted = True
                    self.to_writer.put(_Halt(early=True))
                    return
            message = self.to_compute.get()
            at_boundary = not isinstance(message, _BeginWeight | _Tile | _Lines)
            match message:
                case _Shard() | _Chunk():
                    self.to_writer.put(message)
                case _BeginWeight():
                    weight = _Weight(message, self.engine, self.outputs)
                case _Tile():
                    assert weight is not None
                    self._compute_tile(weight, message)
                case _Lines(slot, output, lines):
                    assert weight is not None
                    piece = weight.turn(output, lines, slot.written[output])
                    self.to_writer.put(_Computed(slot, DONE, [(output, piece)]))
                case _EndWeight(copies):
                    assert weight is not None
                    nothing: tuple[tuple[bytes, ...], Mapping[str, KeptDelta]] = ((), {})
                    self.to_writer.put(_WeightDone({**weight.finish(), **dict.fromkeys(copies, nothing)}))
                    weight = None
                case _Halt():
                    self.to_writer.put(message)
                    return
                case _:
                    assert_never(message)

    def _compute_tile(self, weight: _Weight, tile: _Tile) -> None:
        slot, raw = tile.slot, tile.slot.read[: tile.nbytes]
        if tile.reduces:
            self.to_writer.put(_Reduced(slot, weight.reduce(raw, tile.rows)))
            return
        ticket, pieces = weight.rewrite(raw, tile.rows, slot.written)
        pieces += [(output, raw) for output in tile.copies]
        self.to_writer.put(_Computed(slot, ticket, pieces) if pieces else _Reduced(slot, ticket))

    # -- writer thread -------------------------------------------------------------------------------------

    def write(self) -> None:
        sinks = [output.open_sink() for output in self.outputs]
        try:
            while not isinstance(message := self.to_writer.get(), _Halt):
                self._write(sinks, message)
            for sink in sinks:
                if message.early:
                    sink.halt()
                sink.drain()
        finally:
            self.closed.set()
            for sink in sinks:
                sink.close()

    def _write(
        self, sinks: Sequence[Sink], message: _Shard | _Chunk | _Computed | _Reduced | _WeightDone
    ) -> None:
        match message:
            case _Shard(output, Begin(shard)):
                sinks[output].begin(shard)
            case _Shard(output, End()):
                sinks[output].end()
            case _Shard(output, Constant(_, content)):
                self._write_small(sinks[output], (content,))
                sinks[output].boundary({})
            case _Chunk(slot, nbytes, outputs):
                self._write_pieces(sinks, slot, [(output, slot.read[:nbytes]) for output in outputs])
                for output in outputs:
                    sinks[output].boundary({})
            case _Computed(slot, ticket, pieces):
                ticket.wait()
                self._write_pieces(sinks, slot, pieces)
            case _Reduced(slot, ticket):
                ticket.wait()
                self.free.put(slot)
            case _WeightDone(results):
                for output, (tail, sums) in results.items():
                    self._write_small(sinks[output], tail)
                    sinks[output].boundary(sums)
                self.places.put(None)

    def _write_pieces(self, sinks: Sequence[Sink], slot: _Slot, pieces: Sequence[tuple[int, Tensor]]) -> None:
        slot.hold(len(pieces))
        for output, piece in pieces:
            sinks[output].write(tensor_bytes(piece), slot.release)
            self.run.written.put(piece.numel())

    def _write_small(self, sink: Sink, parts: Sequence[bytes]) -> None:
        for part in parts:
            sink.write(memoryview(part), lambda: None)
            self.run.written.put(len(part))


def _begin(reader: TensorReader, steps: Mapping[int, Rewrite]) -> _BeginWeight:
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
    return _BeginWeight(steps, side, parts)


class _Weight:
    """The work on one weight, for every output that rewrites it, and which pass it is in."""

    def __init__(self, begin: _BeginWeight, engine: Engine, outputs: Sequence[Output]) -> None:
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
