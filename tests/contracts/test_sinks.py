"""What every Sink promises to the writer thread of a run: a new one is tested by a line in KINDS.

A workbench says how a sink is opened, what it has taken, and how to make it fail; `give` alone makes its calls.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamconv.errors import StreamconvError, VerificationError
from streamconv.output import sink as sink_module
from streamconv.output.journal import Journal
from streamconv.output.sink import ShardSink, resume_points
from streamconv.output.verifier import ComparingSink
from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.running.cell import KeptDelta
from streamconv.running.sink import Sink
from tests.contracts.implementations import implementations
from tests.models import Sizes, write_base

SIZES = Sizes(hidden=32, inner=40, layers=1, vocabulary=50)
HARMS = ("before", "behind")
WATERMARK_BYTES = 1000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    base = write_base(tmp_path_factory.mktemp("sinks") / "base", SIZES.shapes, shards=3)
    return prepare(Job(str(base), None, MergeOptions(), "cpu")).plan


def content(shard: ShardPlan) -> bytes:
    """What a shard is made of in these tests: its header, then bytes of its own."""
    body = random.Random(shard.name).randbytes(shard.size - len(shard.header))
    return shard.header + body


# -- the kinds -----------------------------------------------------------------------------------------------------


class Bench(Protocol):
    """A place for an output, where sinks of one kind are opened while `working`."""

    def __init__(self, folder: Path, plan: Plan) -> None: ...

    def open(self) -> Sink: ...

    def taken(self, shard: ShardPlan) -> bytes:
        """The shard as it is once the sink was drained without an error."""

    def harm(self, when: str, shard: ShardPlan, patches: pytest.MonkeyPatch) -> None:
        """Make the shard fail: `before` its first byte, or `behind` the writer, as late as that can be."""

    def close(self) -> None: ...


class Written:
    """Sinks that write the shards of an output, and that a run can go on from."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._out = folder / "out"
        self._out.mkdir(exist_ok=True)
        self._journal = Journal(self._out, plan.fingerprint, resume=True)
        self._journal.__enter__()
        self.starts, self._writers = resume_points(self._out, plan, self._journal)

    def open(self) -> ShardSink:
        return ShardSink(self._journal, self._writers)

    def taken(self, shard: ShardPlan) -> bytes:
        found = self._journal.finished(shard.name).read_bytes()
        assert self._journal.progress.finished[shard.name] == hashlib.sha256(found).hexdigest()
        return found

    @property
    def sums(self) -> Mapping[str, Sequence[float]]:
        """Sums of the weights that need not be written again."""
        return self._journal.progress.sums

    def harm(self, when: str, shard: ShardPlan, patches: pytest.MonkeyPatch) -> None:
        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        if when == "before":
            self._journal.partial(shard.name).mkdir()
        else:
            patches.setattr(os, "fsync", fail)

    def close(self) -> None:
        self._journal.close()


class Compared:
    """Sinks that compare the shards with those of an output."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._out = folder
        for shard in plan.shards:
            (folder / shard.name).write_bytes(content(shard))

    def open(self) -> ComparingSink:
        return ComparingSink(self._out)

    def taken(self, shard: ShardPlan) -> bytes:
        return (self._out / shard.name).read_bytes()

    def harm(self, when: str, shard: ShardPlan, patches: pytest.MonkeyPatch) -> None:
        found = bytearray(content(shard))
        found[0 if when == "before" else -1] ^= 1
        (self._out / shard.name).write_bytes(found)

    def close(self) -> None:
        """Nothing is open."""


KINDS: Mapping[str, Callable[[Path, Plan], Bench]] = MappingProxyType(
    {"written": Written, "compared": Compared}
)
every_kind = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def bench_of(kind: str, plan: Plan) -> Iterator[Bench]:
    """A bench with a folder of its own, for tests that need many."""
    with tempfile.TemporaryDirectory() as folder:
        bench = KINDS[kind](Path(folder), plan)
        try:
            yield bench
        finally:
            bench.close()


def test_every_sink_there_is_has_a_kind(plan: Plan) -> None:
    found = set()
    for kind in KINDS:
        with bench_of(kind, plan) as bench:
            sink = bench.open()
            found.add(type(sink))
            sink.close()
    assert found == implementations(Sink)


# -- how sinks are called ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lent:
    """Buffers that a sink was given. One that it gives back is written over at once, as the next tile would be."""

    given: int = 0
    released: list[int] = field(default_factory=list)

    def lend(self, data: bytes) -> tuple[memoryview, Callable[[], None]]:
        buffer = bytearray(data)
        self.given += 1
        return memoryview(buffer), partial(self._release, self.given, buffer)

    def _release(self, number: int, buffer: bytearray) -> None:
        self.released.append(number)
        buffer[:] = bytes(len(buffer))


Call = Callable[[], None]


def do(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def begin(sink: Sink, shard: ShardPlan) -> Call:
    return lambda: sink.begin(shard)


def give(sink: Sink, lent: Lent, data: bytes, name: str | None = None) -> Call:
    """Bytes; with `name`, the last ones of a weight."""

    def call() -> None:
        sink.write(*lent.lend(data))
        if name is not None:
            sink.boundary({name: KeptDelta(len(data), 1.0, 0.0)})

    return call


def calls_for(sink: Sink, lent: Lent, shard: ShardPlan, pieces: Sequence[bytes]) -> list[Call]:
    """All for one shard, every piece a weight."""
    weights = [give(sink, lent, piece, f"{shard.name}.{number}") for number, piece in enumerate(pieces)]
    return [begin(sink, shard), *weights, sink.end]


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = [0, *sorted(cuts), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(ends)]


def cuts(data: bytes) -> st.SearchStrategy[Sequence[int]]:
    return st.lists(st.integers(0, len(data)), max_size=12)


def body_of(shard: ShardPlan) -> bytes:
    return content(shard)[len(shard.header) :]


def resources() -> tuple[int, set[str]]:
    """Open descriptors, and threads."""
    return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}


# -- bytes ---------------------------------------------------------------------------------------------------------


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_every_byte_counts_in_pieces_of_any_size(plan: Plan, kind: str, data: st.DataObject) -> None:
    """What was given is what was taken; or it was refused. Each piece is given back once, and not looked at after."""
    shard = plan.shards[0]
    body = bytearray(body_of(shard))
    if data.draw(st.booleans()):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1
    lent, refused = Lent(), False
    with bench_of(kind, plan) as bench:
        sink = bench.open()
        try:
            do(calls_for(sink, lent, shard, pieces_of(bytes(body), data.draw(cuts(bytes(body))))))
            sink.drain()
        except VerificationError:
            refused = True
        finally:
            sink.close()
        assert refused or bench.taken(shard) == shard.header + body
        assert not refused or shard.header + body != content(shard)
        assert refused or sorted(lent.released) == list(range(1, lent.given + 1))


@every_kind
def test_shards_follow_each_other(tmp_path: Path, plan: Plan, kind: str) -> None:
    bench, lent = KINDS[kind](tmp_path, plan), Lent()
    sink = bench.open()
    for shard in plan.shards:
        do(calls_for(sink, lent, shard, [body_of(shard)]))
    sink.drain()
    sink.close()
    assert [bench.taken(shard) for shard in plan.shards] == [content(shard) for shard in plan.shards]
    bench.close()


@every_kind
def test_sinks_of_one_output_can_be_open_side_by_side(tmp_path: Path, plan: Plan, kind: str) -> None:
    """One for every shard in work, each called from a thread of its own."""
    bench, lents = KINDS[kind](tmp_path, plan), [Lent() for _ in plan.shards]
    sinks = [bench.open() for _ in plan.shards]
    rows = [
        calls_for(sink, lent, shard, pieces_of(body_of(shard), range(0, 2000, 500)))
        for sink, lent, shard in zip(sinks, lents, plan.shards, strict=True)
    ]
    for calls in zip(*rows, strict=True):
        do(calls)
    for sink in sinks:
        sink.drain()
        sink.close()
    assert [bench.taken(shard) for shard in plan.shards] == [content(shard) for shard in plan.shards]
    bench.close()


# -- ends ----------------------------------------------------------------------------------------------------------


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_a_sink_lets_go_of_everything_wherever_it_is_left(plan: Plan, kind: str, data: st.DataObject) -> None:
    """After any call, and with or without having been told that no more will come."""
    with bench_of(kind, plan) as bench:
        before = resources()
        sink, lent = bench.open(), Lent()
        calls = [
            call
            for shard in plan.shards[:2]
            for call in calls_for(sink, lent, shard, pieces_of(body_of(shard), (500, 700)))
        ]
        do(calls[: data.draw(st.integers(0, len(calls)))])
        if data.draw(st.booleans()):
            sink.halt()
            sink.drain()
        sink.close()
        assert resources() == before
        assert len(lent.released) == lent.given


@every_kind
@pytest.mark.parametrize("when", HARMS)
def test_what_goes_wrong_is_told_by_the_time_it_is_drained(
    tmp_path: Path, plan: Plan, kind: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an error of ours, which names the output; and nothing stays open."""
    bench, lent, shard = KINDS[kind](tmp_path, plan), Lent(), plan.shards[0]
    before = resources()
    sink = bench.open()
    bench.harm(when, shard, monkeypatch)
    with pytest.raises(StreamconvError, match=str(tmp_path)):
        do([*calls_for(sink, lent, shard, pieces_of(body_of(shard), (500, 700))), sink.drain])
    sink.close()
    assert resources() == before
    bench.close()


@every_kind
@pytest.mark.parametrize("change", [-1, 1], ids=["one-less", "one-more"])
def test_bytes_that_are_not_as_many_as_planned_are_refused(
    tmp_path: Path, plan: Plan, kind: str, change: int
) -> None:
    bench, lent, shard = KINDS[kind](tmp_path, plan), Lent(), plan.shards[0]
    body = (body_of(shard) + b".")[: shard.size - len(shard.header) + change]
    sink = bench.open()
    with pytest.raises(VerificationError, match=r"planned with|were planned"):
        do([*calls_for(sink, lent, shard, pieces_of(body, (500,))), sink.drain])
    sink.close()
    bench.close()


# -- sinks that a run can go on from -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def often() -> Iterator[None]:
    """How far a shard is, is noted every few weights of these tests."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sink_module, "WATERMARK_BYTES", WATERMARK_BYTES)
        yield


@pytest.mark.usefixtures("often")
@settings(max_examples=50)
@given(
    cuts=st.lists(st.integers(1, 5000), max_size=12),
    left=st.integers(0, 12),
    is_within=st.booleans(),
    is_told=st.booleans(),
)
@example(cuts=[500], left=1, is_within=False, is_told=True)
@example(cuts=[500, 2000, 2500], left=3, is_within=False, is_told=True)
@example(cuts=[500, 2000], left=2, is_within=True, is_told=True)
@example(cuts=[2000, 2500], left=2, is_within=False, is_told=False)
def test_a_run_goes_on_from_a_boundary_wherever_it_was_left(
    plan: Plan, cuts: Sequence[int], left: int, is_within: bool, is_told: bool
) -> None:
    """After `left` weights, or within the next one; and makes the same file with the same sums. No more is lost than
    the bytes between two watermarks; and nothing, where it was told to halt at a boundary.
    """
    shard, lent = plan.shards[0], Lent()
    body, first = body_of(shard), len(shard.header)
    ends = sorted({*cuts, len(body)})
    left = min(left, len(ends) - 1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Written(Path(folder), plan)
        assert bench.starts[shard.name] == first
        sink = bench.open()
        begin(sink, shard)()
        write_weights(sink, lent, body, ends[:left], 0)
        if is_within:  # a weight, of which all but a byte is there
            give(sink, lent, body[[0, *ends][left] : ends[left] - 1])()
        if is_told:
            sink.halt()
            sink.drain()
        sink.close()
        bench.close()

        bench = Written(Path(folder), plan)
        start = bench.starts[shard.name] - first
        done = [0, *ends].index(start)
        assert done <= left
        assert [0, *ends][left] - start < WATERMARK_BYTES
        assert not is_told or is_within or done == left
        assert set(bench.sums) == {str(number) for number in range(done)}
        sink = bench.open()
        begin(sink, shard)()
        write_weights(sink, lent, body, ends, done)
        sink.end()
        sink.drain()
        sink.close()
        assert bench.taken(shard) == content(shard)
        assert set(bench.sums) == {str(number) for number in range(len(ends))}
        bench.close()
        again = Written(Path(folder), plan)
        assert shard.name not in again.starts
        again.close()


def write_weights(sink: Sink, lent: Lent, body: bytes, ends: Sequence[int], done: int) -> None:
    """The weights that end at `ends`, but for those that are `done`."""
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if number >= done:
            give(sink, lent, body[start:end], str(number))()


@pytest.mark.parametrize("change", [-1, 1], ids=["one-less", "one-more"])
def test_a_shard_that_is_not_as_long_as_planned_is_refused(tmp_path: Path, plan: Plan, change: int) -> None:
    bench, lent, shard = Written(tmp_path, plan), Lent(), plan.shards[0]
    body = (body_of(shard) + b".")[: shard.size - len(shard.header) + change]
    sink = bench.open()
    with pytest.raises(VerificationError, match="planned"):
        do([*calls_for(sink, lent, shard, [body]), sink.drain])
    sink.close()
    bench.close()
    again = Written(tmp_path, plan)
    assert shard.name in again.starts
    again.close()
