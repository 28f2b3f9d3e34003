"""Carries a plan out: a reader thread, the computing thread and a writer thread with bounded buffers between.

    reader ──tiles──▶ compute (the calling thread) ──bytes──▶ writer ──▶ Sink

All buffers are allocated once, before the first read; what bounds memory is their number, not the model. Copied
tensors go from reader to writer without a copy in between. The sink sees a shard's bytes strictly in file order,
and learns of every boundary at which a later run could go on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, assert_never

import torch
from torch import Tensor

from streamconv.cells import KeptDelta, WeightWork, Workers
from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.devices import Device
from streamconv.errors import ResourceError, Stopped
from streamconv.formats.base import Constant
from streamconv.layout import Placed
from streamconv.plan import BUFFERS, WEIGHTS_HELD, Access, Copy, Plan, Rewrite, ShardPlan, Step, tile_rows

# How long a stop request may wait for the weight in work to end, so that no work is lost.
GRACE_S = 5.0
_POLL_S = 0.1


class Sink(Protocol):
    """Where output bytes go; all calls come from one thread, shard by shard, in file order."""

    def begin(self, shard: ShardPlan) -> None:
        """The bytes that follow belong to `shard`, from where its `start` offset said."""

    def write(self, data: memoryview) -> None: ...

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        """All of a weight, or a chunk of a copied one, has been written; a run could go on from here."""

    def end(self) -> None:
        """The shard is complete."""

    def halt(self) -> None:
        """Nothing more will come, though the shard is not complete."""


@dataclass(slots=True)
class StopRequest:
    """Set by a signal handler; the run ends at the next boundary."""

    signal_number: int | None = None


class _Aborted(Exception):  # noqa: N818  unwinds the other threads when one has failed
    pass


T = TypeVar("T")


class _Pipe(Generic[T]):
    """A bounded queue whose ends give up when the run is aborted."""

    def __init__(self, size: int, aborted: threading.Event) -> None:
        self._queue: queue.Queue[T] = queue.Queue(size)
        self._aborted = aborted

    def put(self, item: T) -> None:
        while not self._aborted.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
        raise _Aborted

    def get(self) -> T:
        while not self._aborted.is_set():
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        raise _Aborted


@dataclass(frozen=True, slots=True)
class _BeginShard:
    shard: ShardPlan


@dataclass(frozen=True, slots=True)
class _EndShard:
    pass


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes in `buffer` that go to the output as they are; then the buffer goes back to `home`."""

    buffer: Tensor
    nbytes: int
    home: _Pipe[Tensor]


@dataclass(frozen=True, slots=True)
class _BeginWeight:
    step: Rewrite
    side: Mapping[str, Tensor]
    parts: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Bytes of `rows` in `buffer`; `reduces` tells the first pass of a weight that is read twice."""

    rows: range
    buffer: Tensor
    nbytes: int
    reduces: bool


@dataclass(frozen=True, slots=True)
class _EndWeight:
    pass


@dataclass(frozen=True, slots=True)
class _Small:
    """Tensors written as they are: a weight's parts after the main one, or one that is constant."""

    parts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Boundary:
    sums: Mapping[str, KeptDelta]


@dataclass(frozen=True, slots=True)
class _End:
    """No more shards; `halted` if the run was asked to stop before."""

    halted: bool = False


_Read = _BeginShard | _EndShard | _Chunk | _Small | _BeginWeight | _Tile | _EndWeight | _End
_Write = _BeginShard | _EndShard | _Chunk | _Small | _Boundary | _End


def run_plan(
    plan: Plan,
    sink: Sink,
    starts: Mapping[str, int],
    on_progress: Callable[[int], None],
    stop: StopRequest,
) -> None:
    """Produce every shard named in `starts`, each from the file offset given there.

    `on_progress` is called with the number of output bytes each time some have been handed to the writer.
    Raises Stopped if `stop` was set; whatever a thread raised is raised here.
    """
    threads = torch.get_num_threads()
    # Cells are shared between workers of one thread each: faster than threads inside every operation on a busy
    # machine, and sums come out the same whatever the number of cores.
    torch.set_num_threads(1)
    try:
        with Workers(plan.memory.workers) as workers:
            _Run(plan, sink, starts, on_progress, stop, workers).run()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """State of one run: pipes, buffers, and the first error of any thread."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        starts: Mapping[str, int],
        on_progress: Callable[[int], None],
        stop: StopRequest,
        workers: Workers,
    ) -> None:
        self.workers = workers
        self.plan, self.sink, self.starts = plan, sink, starts
        self.on_progress, self.stop = on_progress, stop
        self.device = plan.device
        self.aborted = threading.Event()
        self.errors: list[BaseException] = []
        self.halted = False
        # Two pools: a reader that ran ahead must not hold the buffers that computed tiles need.
        self.inputs, self.outputs = self._pool(), self._pool()
        # Of small weights, many tiles fit the buffers; their side parts and adapters must not pile up.
        self.places: _Pipe[None] = _Pipe(0, self.aborted)
        for _ in range(WEIGHTS_HELD):
            self.places.put(None)
        self.to_compute: _Pipe[_Read] = _Pipe(BUFFERS, self.aborted)
        self.to_writer: _Pipe[_Write] = _Pipe(BUFFERS, self.aborted)

    def _pool(self) -> _Pipe[Tensor]:
        pool: _Pipe[Tensor] = _Pipe(0, self.aborted)
        for _ in range(BUFFERS // 2):
            pool.put(self.device.host_buffer(self.plan.memory.buffer))
        return pool

    def run(self) -> None:
        reader, writer = (
            threading.Thread(target=self._guarded, args=(work,), name=f"streamconv-{name}", daemon=True)
            for name, work in (("reader", self.read), ("writer", self.write))
        )
        reader.start()
        writer.start()
        try:
            self._guarded(self.compute)
            writer.join()
        finally:  # even if Ctrl-C is raised here: no thread may outlive the files it works on
            self.aborted.set()
            reader.join()
            writer.join()
        if self.errors:
            error = self.errors[0]
            if isinstance(error, torch.OutOfMemoryError):
                raise ResourceError(
                    f"{self.device.name} ran out of memory: {str(error).splitlines()[0]} Give it a smaller --max-vram, "
                    "free some memory, or use --device cpu, and run again"
                ) from error
            raise error
        if self.halted:
            assert self.stop.signal_number is not None
            raise Stopped("stopped by a signal; run the same command again to go on", self.stop.signal_number)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _Aborted:
            pass
        except BaseException as error:  # run() raises it in the calling thread
            self.errors.append(error)
            self.aborted.set()

    # -- reader thread -------------------------------------------------------------------------------------

    def read(self) -> None:
        with TensorReader() as reader:
            for shard in self.plan.shards:
                if shard.name in self.starts:
                    self.to_compute.put(_BeginShard(shard))
                    for placed in shard.steps:
                        self._read_step(reader, placed, self.starts[shard.name])
                    self.to_compute.put(_EndShard())
            reader.check_unchanged()
        self.to_compute.put(_End())

    def _read_step(self, reader: TensorReader, placed: Placed[Step], start: int) -> None:
        if start >= placed.offset + placed.nbytes:
            return
        match placed.step:
            case Copy() as step:
                self._read_copy(reader, step, max(0, start - placed.offset))
            case Rewrite() as step:
                assert start <= placed.offset, "a run goes on from a weight's beginning"
                self._read_weight(reader, step)
            case Constant() as step:
                self.to_compute.put(_Small((step.content,)))
            case _:
                assert_never(placed.step)

    def _read_copy(self, reader: TensorReader, step: Copy, start: int) -> None:
        chunk = self.plan.memory.buffer
        for first in range(start, step.tensor.nbytes, chunk):
            nbytes = min(chunk, step.tensor.nbytes - first)
            buffer = self.inputs.get()
            reader.read_into(step.tensor, first, tensor_bytes(buffer[:nbytes]))
            reader.drop_cache(step.tensor, first, nbytes)
            self.to_compute.put(_Chunk(buffer, nbytes, self.inputs))

    def _read_weight(self, reader: TensorReader, step: Rewrite) -> None:
        decoder, parts = step.weight.decoder, step.weight.parts
        self.places.get()
        side = {role: reader.load(part) for role, part in parts.items() if role != decoder.main}
        updates = tuple(
            {role: reader.load(part).float() for role, part in update.parts.items()}
            for update in step.updates
        )
        self.to_compute.put(_BeginWeight(step, side, updates))
        passes = (False,) if step.access is Access.ROW else (True, False)
        main, rows = parts[decoder.main], tile_rows(step, self.plan.memory.buffer)
        for reduces in passes:
            for first in range(0, step.rows, rows):
                tile = range(first, min(first + rows, step.rows))
                start, stop = decoder.row_offset(tile.start), decoder.row_offset(tile.stop)
                buffer = self.inputs.get()
                reader.read_into(main, start, tensor_bytes(buffer[: stop - start]))
                if not reduces:
                    reader.drop_cache(main, start, stop - start)
                self.to_compute.put(_Tile(tile, buffer, stop - start, reduces))
        self.to_compute.put(_EndWeight())

    # -- computing thread ----------------------------------------------------------------------------------

    def compute(self) -> None:
        weight: _Weight | None = None
        asked_at: float | None = None
        at_boundary = True
        while True:
            if self.stop.signal_number is not None:
                asked_at = asked_at or time.monotonic()
                if at_boundary or time.monotonic() - asked_at > GRACE_S:
                    self.halted = True
                    self.to_writer.put(_End(halted=True))
                    return
            message = self.to_compute.get()
            at_boundary = not isinstance(message, _BeginWeight | _Tile)
            match message:
                case _BeginShard() | _EndShard():
                    self.to_writer.put(message)
                case _Chunk():
                    self.to_writer.put(message)
                    self.to_writer.put(_Boundary({}))
                    self.on_progress(message.nbytes)
                case _Small(parts):
                    self._write_small(parts)
                    self.to_writer.put(_Boundary({}))
                case _BeginWeight():
                    weight = _Weight(message, self.device, self.plan.options.seed, self.workers)
                case _Tile():
                    assert weight is not None
                    self._compute_tile(weight, message)
                case _EndWeight():
                    assert weight is not None
                    self._end_weight(weight)
                    weight = None
                    self.places.put(None)
                case _End():
                    self.to_writer.put(message)
                    return
                case _:
                    assert_never(message)

    def _compute_tile(self, weight: _Weight, tile: _Tile) -> None:
        raw = self.device.upload(tile.buffer[: tile.nbytes])
        if tile.reduces:
            weight.reduce(raw, tile.rows)
            self.inputs.put(tile.buffer)
            return
        encoder = weight.step.encoder
        nbytes = encoder.row_offset(tile.rows.stop) - encoder.row_offset(tile.rows.start)
        host = self.outputs.get()
        out = self.device.output(host[:nbytes])
        weight.rewrite(raw, tile.rows, out)
        self.device.download(out, host[:nbytes])
        self.inputs.put(tile.buffer)
        self.to_writer.put(_Chunk(host, nbytes, self.outputs))
        self.on_progress(nbytes)

    def _end_weight(self, weight: _Weight) -> None:
        parts, kept = weight.work.finish()
        if parts:
            self._write_small(parts)
        self.to_writer.put(_Boundary({} if kept is None else {weight.step.name: kept}))

    def _write_small(self, parts: tuple[bytes, ...]) -> None:
        self.to_writer.put(_Small(parts))
        self.on_progress(sum(map(len, parts)))

    # -- writer thread -------------------------------------------------------------------------------------

    def write(self) -> None:
        for message in self._messages():
            match message:
                case _BeginShard(shard):
                    self.sink.begin(shard)
                case _EndShard():
                    self.sink.end()
                case _Chunk(buffer, nbytes, home):
                    self.sink.write(tensor_bytes(buffer[:nbytes]))
                    home.put(buffer)
                case _Small(parts):
                    for part in parts:
                        self.sink.write(memoryview(part))
                case _Boundary(sums):
                    self.sink.boundary(sums)
                case _:
                    assert_never(message)

    def _messages(self) -> Iterator[_BeginShard | _EndShard | _Chunk | _Small | _Boundary]:
        while True:
            message = self.to_writer.get()
            if isinstance(message, _End):
                if message.halted:
                    self.sink.halt()
                return
            yield message


class _Weight:
    """The work on one weight, and which pass it is in."""

    def __init__(self, begin: _BeginWeight, device: Device, seed: int, workers: Workers) -> None:
        self.step = begin.step
        side = {role: device.upload(part) for role, part in begin.side.items()}
        parts: Sequence[Mapping[str, Tensor]] = [
            {role: device.upload(part) for role, part in update.items()} for update in begin.parts
        ]
        self.work = WeightWork(begin.step, side, parts, device.torch, seed, workers)
        self._reducing = begin.step.access is not Access.ROW

    def reduce(self, raw: Tensor, rows: range) -> None:
        self.work.reduce(raw, rows)

    def rewrite(self, raw: Tensor, rows: range, out: Tensor) -> None:
        if self._reducing:
            self.work.end_reduce()
            self._reducing = False
        self.work.rewrite(raw, rows, out)
