"""Lanes: reader, compute and writer threads, and the run that owns them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import assert_never

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, placed, tensor_bytes
from streamconv.checkpoint.types import StoredTensor
from streamconv.disk import BLOCK
from streamconv.errors import Stopped
from streamconv.formats.base import Constant, Weight
from streamconv.formats.rows import StoredRows, runs
from streamconv.memory_errors import is_out_of_memory, ran_out
from streamconv.planning.plan import (
    SLOTS,
    WEIGHTS_HELD,
    Access,
    Copy,
    Memory,
    Rewrite,
    SideParts,
    cell_rows,
    tile_rows,
)
from streamconv.progress import OnBytes, StopRequest
from streamconv.running.engine import Engine
from streamconv.running.lane_weight import LaneWeight
from streamconv.running.messages import (
    BeginWeight,
    Chunk,
    Computed,
    EndWeight,
    Finished,
    Halt,
    LaneClosed,
    Lines,
    Pipe,
    Reduced,
    ShardEvent,
    Slot,
    Tile,
    ToCompute,
    ToWriter,
    WeightDone,
)
from streamconv.running.opened import load_weight
from streamconv.running.schedule import Begin, Cursor, End, Todo, files_read, walk
from streamconv.running.sink import Output, Sink
from streamconv.running.waiting import WaitingParts
from streamconv.running.workers import DONE
from streamconv.storage.arrivals import Incoming
from streamconv.system_errors import no_memory
from streamconv.threads import start_thread

# How long a stop request may wait for the weight in work to end, so that no work is lost.
GRACE_S = 5.0

# How often threads are looked after that tell nothing.
LOOK_EVERY_S = 5.0


class Run:
    """All lanes of a run, the first error of any thread, and what has been written."""

    def __init__(
        self,
        outputs: Sequence[Output],
        memory: Memory,
        engines: Sequence[Engine],
        stop: StopRequest,
        sources: Incoming,
    ) -> None:
        self.device, self.stop, self.sources = outputs[0].plan.device, stop, sources
        self.errors: list[BaseException] = []
        self.written: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        cursors = [Cursor(output.plan, output.starts) for output in outputs]
        self.lanes = [
            Lane(self, outputs, cursors, memory, engine, number) for number, engine in enumerate(engines)
        ]

    def run(self, on_bytes: OnBytes) -> None:
        threads: list[threading.Thread] = []
        try:
            for name, work in [each for lane in self.lanes for each in lane.work]:
                threads.append(start_thread(partial(self.guarded, work), name))
            self._report(on_bytes, threads)
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
        except LaneClosed:
            pass
        except BaseException as error:  # run() raises it in the calling thread
            self.fail(error)
        finally:
            self.written.put(None)

    def _report(self, on_bytes: OnBytes, threads: Sequence[threading.Thread]) -> None:
        ended = 0
        while ended < len(threads):
            try:
                nbytes = self.written.get(timeout=LOOK_EVERY_S)
            except queue.Empty:  # a thread without memory may end and not even tell
                if not any(thread.is_alive() for thread in threads):
                    raise no_memory("a thread ended without a word") from None
                continue
            if nbytes is None:
                ended += 1
            elif not self.errors:
                on_bytes(nbytes)

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C, once more
            self.fail(error)
            for thread in threads:
                thread.join()

    def _told(self, error: BaseException) -> BaseException:
        if not is_out_of_memory(error):
            return error
        remedy = "Give it a smaller --max-vram, free some memory, or use --device cpu, and run again"
        return ran_out(self.device.name, error, remedy)


class Lane:
    """Three threads, the slots that go round between them, and the sinks they fill."""

    def __init__(
        self,
        run: Run,
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
        self.free: Pipe[Slot] = Pipe(0, self.closed)
        # To choose where in a buffer bytes lie; memory that a GPU copies to comes in powers of two, and has none over.
        room = BLOCK if run.device.is_cpu else 0
        for _ in range(SLOTS):
            read = engine.host_buffer(memory.buffer + room)
            written = [engine.host_buffer(memory.written_buffer + room) for _ in outputs]
            self.free.put(Slot(read, written, self.free.put))
        # Of small weights, many tiles fit the slots; their side parts and adapters must not pile up.
        self.places: Pipe[None] = Pipe(0, self.closed)
        for _ in range(WEIGHTS_HELD):
            self.places.put(None)
        self.to_compute: Pipe[ToCompute] = Pipe(SLOTS, self.closed)
        self.to_writer: Pipe[ToWriter] = Pipe(SLOTS, self.closed)
        suffix = f"-{number}" if memory.lanes > 1 else ""
        self.work = [
            (f"{name}{suffix}", work)
            for name, work in (("reader", self.read), ("compute", self.compute), ("writer", self.write))
        ]

    # -- reader thread -------------------------------------------------------------------------------------

    def read(self) -> None:
        sources, over = self.run.sources, 0
        with TensorReader() as reader:
            for unit in walk(self.cursors):
                files = files_read(unit)
                if not sources.wait(files, self._is_over):
                    self.halted = True
                    self.to_compute.put(Halt(early=True))
                    return
                self._read_unit(reader, unit)
                sources.read(files)
                removed = sources.over(over)
                over += len(removed)
                for file in removed:
                    reader.forget(file)
                sources.remove(removed)
            reader.check_unchanged()
        self.to_compute.put(Halt())

    def _is_over(self) -> bool:
        """Whether nothing is worth waiting for any more."""
        return self.closed.is_set() or self.run.stop.signal_number is not None

    def _read_unit(self, reader: TensorReader, unit: Mapping[int, Begin | End | Todo]) -> None:
        rewrites: dict[int, tuple[Rewrite, int]] = {}
        copies: dict[int, tuple[Copy, int]] = {}
        for output, event in unit.items():
            match event:
                case Begin() | End():
                    self.to_compute.put(ShardEvent(output, event))
                case Todo((Constant() | SideParts()) as step):
                    self.to_compute.put(ShardEvent(output, step))
                case Todo(Copy() as step, done):
                    copies[output] = (step, done)
                case Todo(Rewrite() as step, _, offset):
                    rewrites[output] = (step, offset)
        if rewrites:
            # Tiles of a weight that the file has in another order than by rows are not the file's bytes.
            is_by_rows = next(iter(rewrites.values()))[0].weight.decoder.order is None
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
            raw = placed(slot.read, tensor.offset + first, nbytes)
            reader.read_into(tensor, first, tensor_bytes(raw))
            reader.drop_cache(tensor, first, nbytes)
            reader.check_recent()  # a watermark may follow
            self.to_compute.put(Chunk(slot, raw, outputs))

    def _read_weight(
        self, reader: TensorReader, todo: Mapping[int, tuple[Rewrite, int]], copies: tuple[int, ...]
    ) -> None:
        steps = {output: step for output, (step, _) in todo.items()}
        weight = next(iter(steps.values())).weight
        self.places.get()
        offsets = tuple(offset for _, offset in todo.values())
        loaded = load_weight(reader, tuple(steps.values()))
        self.to_compute.put(BeginWeight(tuple(steps), offsets, loaded))
        height = max(cell_rows(self.run.device, step) for step in steps.values())
        memory = self.memory
        rows = min(tile_rows(step, memory.buffer, height, memory.written) for step in steps.values())
        count = next(iter(steps.values())).rows
        twice = any(step.access is not Access.ROW for step in steps.values())
        stored = self._stored_rows(reader, weight)
        for reduces in (True, False) if twice else (False,):
            for first in range(0, count, rows):
                tile = range(first, min(first + rows, count))
                slot = self.free.get()
                raw = slot.read[: stored.nbytes(tile)] if twice else stored.place(tile, slot.read)
                stored.read_into(tile, raw)
                if not reduces:
                    stored.drop_cache(tile)
                self.to_compute.put(Tile(tile, slot, raw, reduces, copies))
        for output, step in steps.items():
            if step.encoder.order is not None:
                for lines in runs(step.encoder.order, self.memory.written_buffer):
                    self.to_compute.put(Lines(self.free.get(), output, lines))
        reader.check_recent()
        self.to_compute.put(EndWeight(copies))

    def _stored_rows(self, reader: TensorReader, weight: Weight) -> StoredRows:
        if weight.decoder.order is None:
            return StoredRows(reader, weight)
        slot = self.free.get()
        stored = StoredRows(reader, weight, slot.read[: self.memory.buffer])
        self.free.put(slot)
        return stored

    # -- computing thread ----------------------------------------------------------------------------------

    def compute(self) -> None:
        weight: LaneWeight | None = None
        asked_at: float | None = None
        waiting = 0  # parts that are made and have their place behind other weights
        while True:
            if self.run.stop.signal_number is not None:
                asked_at = asked_at or time.monotonic()
                if (weight is None and not waiting) or time.monotonic() - asked_at > GRACE_S:
                    self.halted = True
                    self.to_writer.put(Halt(early=True))
                    return
            message = self.to_compute.get()
            match message:
                case ShardEvent(_, SideParts(_, weights)):
                    waiting -= len(weights)
                    self.to_writer.put(message)
                case ShardEvent() | Chunk():
                    self.to_writer.put(message)
                case BeginWeight():
                    weight = LaneWeight(message, self.engine, self.outputs)
                case Tile():
                    assert weight is not None
                    self._compute_tile(weight, message)
                case Lines(slot, output, lines):
                    assert weight is not None
                    piece = weight.reorder(output, lines, slot.written[output])
                    self.to_writer.put(Computed(slot, DONE, [(output, piece)]))
                case EndWeight(copies):
                    assert weight is not None
                    results = {**weight.finish(), **dict.fromkeys(copies, Finished())}
                    waiting += sum(len(done.parts) for done in results.values() if done.waits)
                    self.to_writer.put(WeightDone(results))
                    weight = None
                case Halt():
                    self.to_writer.put(message)
                    return
                case _:
                    assert_never(message)

    def _compute_tile(self, weight: LaneWeight, tile: Tile) -> None:
        slot, raw = tile.slot, tile.raw
        if tile.reduces:
            self.to_writer.put(Reduced(slot, weight.reduce(raw, tile.rows)))
            return
        ticket, pieces = weight.rewrite(raw, tile.rows, slot.written)
        pieces += [(output, raw) for output in tile.copies]
        self.to_writer.put(Computed(slot, ticket, pieces) if pieces else Reduced(slot, ticket))

    # -- writer thread -------------------------------------------------------------------------------------

    def write(self) -> None:
        sinks = [output.open_sink() for output in self.outputs]
        waiting = [WaitingParts(sink) for sink in sinks]
        try:
            while not isinstance(message := self.to_writer.get(), Halt):
                self._write(sinks, waiting, message)
            for sink in sinks:
                if message.early:
                    sink.halt()
                sink.drain()
        finally:
            self.closed.set()
            for sink in sinks:
                sink.close()

    def _write(
        self,
        sinks: Sequence[Sink],
        waiting: Sequence[WaitingParts],
        message: ShardEvent | Chunk | Computed | Reduced | WeightDone,
    ) -> None:
        match message:
            case ShardEvent(output, Begin(shard)):
                sinks[output].begin(shard)
            case ShardEvent(output, End()):
                sinks[output].end()
            case ShardEvent(output, Constant(_, content)):
                self._write_small(sinks[output], (content,))
                waiting[output].boundary({})
            case ShardEvent(output, SideParts() as step):
                self._write_small(sinks[output], waiting[output].take(step))
                waiting[output].boundary({})
            case Chunk(slot, raw, outputs):
                self._write_pieces(sinks, slot, [(output, raw) for output in outputs])
                for output in outputs:
                    waiting[output].boundary({})
            case Computed(slot, ticket, pieces):
                ticket.wait()
                self._write_pieces(sinks, slot, pieces)
            case Reduced(slot, ticket):
                ticket.wait()
                self.free.put(slot)
            case WeightDone(results):
                for output, done in results.items():
                    if done.waits is None:
                        self._write_small(sinks[output], done.parts)
                    else:
                        waiting[output].hold(done.waits, done.parts)
                    waiting[output].boundary(done.sums)
                self.places.put(None)

    def _write_pieces(self, sinks: Sequence[Sink], slot: Slot, pieces: Sequence[tuple[int, Tensor]]) -> None:
        slot.hold(len(pieces))
        for output, piece in pieces:
            sinks[output].write(tensor_bytes(piece), slot.release)
            self.run.written.put(piece.numel())

    def _write_small(self, sink: Sink, parts: Sequence[bytes]) -> None:
        for part in parts:
            sink.write(memoryview(part), lambda: None)
            self.run.written.put(len(part))
