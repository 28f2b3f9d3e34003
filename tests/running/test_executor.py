"""The three threads of a run: what the sink sees, errors, stop requests, bounded memory, and where it may go on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from streamconv import threads
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.disk import BLOCK
from streamconv.errors import CheckpointError, InputError, ResourceError, Stopped
from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import SLOTS, WEIGHTS_HELD, Memory, Plan, ShardPlan
from streamconv.progress import StopRequest
from streamconv.running import lanes
from streamconv.running.cell import KeptDelta
from streamconv.running.cells import WeightWork
from streamconv.running.direct import DirectEngine
from streamconv.running.executor import run_plans
from streamconv.running.schedule import bytes_read
from streamconv.running.sink import Output
from streamconv.running.workers import Ticket
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_tensors

SIZES = Sizes(hidden=128, inner=260, layers=2, vocabulary=400)
TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")
TILE = 64 * 1024


@dataclass
class Recorder:
    """A sink that keeps everything; `fail` may raise at any of its calls, numbered from 1."""

    fail: Callable[[int, str], None] = lambda number, call: None
    shards: dict[str, bytearray] = field(default_factory=dict)
    boundaries: dict[str, list[int]] = field(default_factory=dict)
    sums: dict[str, KeptDelta] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    shard: str = ""
    drained: bool = False
    closed: bool = False

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        self.fail(len(self.calls), call)

    def begin(self, shard: ShardPlan) -> None:
        self._note("begin")
        self.shard = shard.name
        self.shards[shard.name], self.boundaries[shard.name] = bytearray(), []

    def write(self, data: memoryview, release: Callable[[], None]) -> None:
        self._note("write")
        self.shards[self.shard] += data
        release()

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        self._note("boundary")
        self.boundaries[self.shard].append(len(self.shards[self.shard]))
        self.sums |= sums

    def end(self) -> None:
        self._note("end")

    def halt(self) -> None:
        self._note("halt")

    def drain(self) -> None:
        self.drained = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("executor") / "base", SIZES.shapes, shards=2)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("executor") / "adapter", SIZES.shapes, targets=TARGETS)


def planned(base: Path, adapter: Path, workers: int = 2, **options: Any) -> Plan:
    """A plan with tiles of 64 KiB: the embedding is copied in two chunks, an MLP weight has two tiles."""
    plan = prepare(Job(str(base), str(adapter), MergeOptions(**options), "cpu")).plan
    return dataclasses.replace(plan, memory=Memory(0, 0, TILE, workers))


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"quant": "nf4-dq", "merge_base": "nf4-dq"},
        {"quant": "int8"},
        {"quant": "w4a16", "group_size": 32},
    ],
    ids=["bf16", "nf4-dq", "int8", "w4a16"],
)
def plan(request: pytest.FixtureRequest, base: Path, adapter: Path) -> Plan:
    return planned(base, adapter, **request.param)


def from_the_start(plan: Plan) -> Mapping[str, int]:
    return {shard.name: len(shard.header) for shard in plan.shards}


def quiet(nbytes: int) -> None:
    del nbytes


def carry_out(
    plan: Plan,
    sink: Recorder,
    starts: Mapping[str, int] | None = None,
    on_bytes: Callable[[int], None] = quiet,
    stop: StopRequest | None = None,
) -> Recorder:
    """Run it, in a time that no deadlock would keep to, and see that no thread is left."""
    starts = from_the_start(plan) if starts is None else starts
    began = time.monotonic()
    try:
        run_plans([Output(plan, starts, lambda: sink)], on_bytes, stop or StopRequest())
    finally:
        assert time.monotonic() - began < 60
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("streamconv")]
    return sink


def bytes_of(sink: Recorder) -> dict[str, bytes]:
    return {name: bytes(content) for name, content in sink.shards.items()}


# -- what the sink sees ------------------------------------------------------------------------------------------


def test_every_shard_is_written_in_full_by_one_thread_in_order(plan: Plan) -> None:
    done: list[int] = []
    sink = carry_out(plan, Recorder(), on_bytes=done.append)
    assert list(sink.shards) == [shard.name for shard in plan.shards]
    for shard in plan.shards:
        assert len(shard.header) + len(sink.shards[shard.name]) == shard.size
        assert sink.boundaries[shard.name][-1] == len(sink.shards[shard.name])
    assert sink.threads == {"streamconv-writer"}
    assert sink.drained
    assert sink.closed
    assert sink.calls.count("begin") == sink.calls.count("end") == len(plan.shards)
    assert "halt" not in sink.calls
    assert sum(done) == sum(shard.size - len(shard.header) for shard in plan.shards)


def test_it_can_go_on_from_every_boundary(plan: Plan) -> None:
    whole = carry_out(plan, Recorder())
    for shard in plan.shards:
        boundaries = whole.boundaries[shard.name]
        assert len(boundaries) > 5
        for boundary in boundaries:
            rest = carry_out(plan, Recorder(), {shard.name: len(shard.header) + boundary})
            assert list(rest.shards) == [shard.name]
            assert rest.shards[shard.name] == whole.shards[shard.name][boundary:]
            assert rest.sums.items() <= whole.sums.items()


def test_a_boundary_carries_the_sums_of_the_weight_before_it(plan: Plan) -> None:
    """Sums known at a boundary and those of a run that goes on from there are all there are, none twice."""
    whole = carry_out(plan, Recorder())
    shard = plan.shards[-1]
    seen: list[set[str]] = []
    sink = Recorder()
    sink.fail = lambda number, call: seen.append(set(sink.sums)) if call in ("boundary", "end") else None
    carry_out(plan, sink, {shard.name: len(shard.header)})
    for known, boundary in zip(seen[1:], whole.boundaries[shard.name], strict=True):
        rest = carry_out(plan, Recorder(), {shard.name: len(shard.header) + boundary})
        assert set(rest.sums) | known == set(seen[-1])
        assert not set(rest.sums) & known


def test_nothing_to_do_is_done_at_once(plan: Plan) -> None:
    assert carry_out(plan, Recorder(), {}).calls == []


# -- lanes -------------------------------------------------------------------------------------------------------


def carry_out_in_lanes(plan: Plan, recorders: Sequence[Recorder], stop: StopRequest | None = None) -> None:
    """As `carry_out`, with as many lanes as recorders."""
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, lanes=len(recorders)))
    left = list(recorders)
    try:
        run_plans([Output(plan, from_the_start(plan), left.pop)], quiet, stop or StopRequest())
    finally:
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("streamconv")]
        assert not left
        assert all(recorder.closed for recorder in recorders)


@pytest.fixture(scope="module")
def many(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of many shards."""
    base = write_base(tmp_path_factory.mktemp("many") / "base", SIZES.shapes, shards=9)
    return planned(base, adapter, quant="nf4", rounding="nearest", max_shard_bytes=40_000)


@pytest.mark.parametrize("lanes", [2, 3, 8])
def test_lanes_share_the_shards(many: Plan, lanes: int) -> None:
    alone = carry_out(many, Recorder())
    recorders = [Recorder(lambda number, call: time.sleep(0.001)) for _ in range(lanes)]
    carry_out_in_lanes(many, recorders)
    found = [name for recorder in recorders for name in recorder.shards]
    assert sorted(found) == [shard.name for shard in many.shards]
    assert sum(bool(recorder.shards) for recorder in recorders) > 1
    for recorder in recorders:
        assert len(recorder.threads) <= 1
        assert bytes_of(recorder).items() <= bytes_of(alone).items()
        assert recorder.sums.items() <= alone.sums.items()
        assert recorder.calls.count("begin") == recorder.calls.count("end") == len(recorder.shards)


def test_an_error_in_one_lane_ends_all(many: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever lane makes the fifth call fails, as one lane may take every shard; the others wait for its error."""
    told, calls, fail_all = threading.Event(), itertools.count(1), lanes.Run.fail
    late: list[str] = []

    def telling(run: lanes.Run, error: BaseException) -> None:
        fail_all(run, error)
        told.set()

    def fail(number: int, call: str) -> None:
        turn = next(calls)
        if turn == 5:
            raise OddError("the fifth call")
        if turn > 5:
            assert told.wait(timeout=30)
            late.append(call)

    monkeypatch.setattr(lanes.Run, "fail", telling)
    with pytest.raises(OddError, match=r"the fifth call$"):
        carry_out_in_lanes(many, [Recorder(fail) for _ in range(3)])
    assert late.count("begin") <= 2 < len(many.shards) - 5  # of what either of them had in hand


def test_a_stop_request_halts_every_lane_at_a_boundary(many: Plan) -> None:
    stop = StopRequest()
    # Whichever lane comes so far first: one may get no more than a shard while the others take the rest.
    recorders = [Recorder(stopping_at(9, stop)) for _ in range(3)]
    with pytest.raises(Stopped):
        carry_out_in_lanes(many, recorders, stop)
    for recorder in recorders:
        assert recorder.drained
        if recorder.calls[-1:] == ["halt"] and recorder.shard:
            assert len(recorder.shards[recorder.shard]) == (recorder.boundaries[recorder.shard] or [0])[-1]
    assert sum(recorder.calls.count("end") for recorder in recorders) < len(many.shards)


# -- errors ------------------------------------------------------------------------------------------------------


class OddError(Exception):
    """Of no kind that anybody expects."""


def failing_at(at: int) -> Callable[[int, str], None]:
    def fail(number: int, call: str) -> None:
        if number == at:
            raise OddError(f"{call}, number {number}")

    return fail


def test_an_error_of_the_writer_comes_out_whenever_it_happens(plan: Plan) -> None:
    calls = len(carry_out(plan, Recorder()).calls)
    for at in sorted({1, 2, 3, 4, 7, 11, calls // 2, calls - 1, calls}):
        with pytest.raises(OddError, match=f"number {at}$"):
            carry_out(plan, Recorder(failing_at(at)))


def test_an_error_of_the_reader_comes_out_whenever_it_happens(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = TensorReader.read_into
    reads = 0

    def failing(at: int) -> Callable[..., None]:
        def read(*given: Any) -> None:
            nonlocal reads
            reads += 1
            if reads == at:
                raise OddError(f"read {at}")
            read_into(*given)

        return read

    monkeypatch.setattr(TensorReader, "read_into", failing(0))
    carry_out(plan, Recorder())
    for at in sorted({1, 2, 3, 5, 8, reads // 2, reads}):
        reads = 0
        monkeypatch.setattr(TensorReader, "read_into", failing(at))
        with pytest.raises(OddError, match=f"read {at}$"):
            carry_out(plan, Recorder())


def test_an_error_while_computing_comes_out_whenever_it_happens(plan: Plan) -> None:
    for at in (1, 2, 5, 9):
        progressed = 0

        def fail(nbytes: int, at: int = at) -> None:
            nonlocal progressed
            progressed += 1
            if progressed == at:
                raise OddError("of the caller's own function")

        with pytest.raises(OddError):
            carry_out(plan, Recorder(), on_bytes=fail)


def test_an_error_comes_out_while_the_others_wait_for_each_other(plan: Plan) -> None:
    """The writer takes nothing until buffers and queues are full and everybody waits; then it fails."""

    def fail(number: int, call: str) -> None:
        if call == "write":
            time.sleep(0.5)
            raise OddError("the disk is gone")

    began = time.monotonic()
    with pytest.raises(OddError, match="the disk is gone"):
        carry_out(plan, Recorder(fail))
    assert time.monotonic() - began < 5


def test_ctrl_c_in_any_place_of_the_calling_thread_ends_all_threads(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While computing, and while it waits for the writer's last work."""

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, Recorder(), on_bytes=interrupt)

    join, interrupted = threading.Thread.join, False

    def join_interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        nonlocal interrupted
        if thread.name == "streamconv-writer" and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join_interrupted)
    slow = Recorder(lambda number, call: time.sleep(0.01))
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, slow)
    assert interrupted


def test_the_first_of_several_errors_comes_out(plan: Plan) -> None:
    failed: list[str] = []

    def fail(number: int, call: str) -> None:
        if number == 3:
            failed.append("writer")
            raise ResourceError("the disk is full")

    def progress(nbytes: int) -> None:
        if failed:
            time.sleep(0.3)
            raise OddError("later")

    with pytest.raises(ResourceError, match="the disk is full"):
        carry_out(plan, Recorder(fail), on_bytes=progress)


def test_a_base_that_changes_while_it_is_read_is_an_error(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=2)
    last = sorted(base.glob("*.safetensors"))[-1]
    plan = planned(base, adapter)
    sink = Recorder()

    def touch(number: int, call: str) -> None:
        if call == "begin" and sink.calls.count("begin") == 2:
            with last.open("rb+") as file:
                file.write(b"\0")

    sink.fail = touch
    with pytest.raises(CheckpointError, match=last.name):
        carry_out(plan, sink)


def test_a_base_cut_short_is_an_error_that_names_the_file(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    plan = planned(base, adapter)
    file = base / "model.safetensors"
    half = file.stat().st_size // 2
    read_into = TensorReader.read_into

    def cutting(*given: Any) -> None:
        read_into(*given)
        if file.stat().st_size > half:
            os.truncate(file, half)

    monkeypatch.setattr(TensorReader, "read_into", cutting)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors(: tensor model\.| changed while it was in use)"
    ):
        carry_out(plan, Recorder())


@pytest.mark.parametrize("workers", [1, 3])
def test_nan_is_named_whatever_worker_finds_it(adapter: Path, tmp_path: Path, workers: int) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[name]
    values[[100, 200, 259], [3, 2, 1]] = float("nan")
    edit_tensors(base / "model.safetensors", put={name: values})
    plan = dataclasses.replace(planned(base, adapter), memory=Memory(0, 0, 2**20, workers))
    with pytest.raises(InputError, match=f"{name}: the value at row 100, column 3 is nan"):
        carry_out(plan, Recorder())


# -- stopping ----------------------------------------------------------------------------------------------------


def stopping_at(at: int, stop: StopRequest) -> Callable[[int, str], None]:
    def ask(number: int, call: str) -> None:
        if number == at:
            stop.signal_number = signal.SIGTERM

    return ask


def test_a_stop_request_ends_the_run_at_a_boundary(plan: Plan) -> None:
    undisturbed = carry_out(plan, Recorder())
    whole, calls, halted = bytes_of(undisturbed), len(undisturbed.calls), 0
    for at in range(1, calls, 9):
        stop = StopRequest()
        sink = Recorder(stopping_at(at, stop))
        with contextlib.suppress(Stopped):
            carry_out(plan, sink, stop=stop)
        if sink.calls[-1] == "halt":
            # What has been written ends where a run may begin.
            assert len(sink.shards[sink.shard]) == (sink.boundaries[sink.shard] or [0])[-1]
            halted += 1
        else:  # everything was on its way to the writer
            assert sink.calls[-1] == "end"
            assert bytes_of(sink) == whole
    assert halted > 3


def test_a_stop_request_before_the_run_ends_it_before_it_writes(plan: Plan) -> None:
    with pytest.raises(Stopped) as caught:
        carry_out(plan, sink := Recorder(), stop=StopRequest(signal.SIGINT))
    assert caught.value.exit_code == 130
    assert sink.calls == ["halt"]


def test_a_weight_that_takes_too_long_is_not_waited_for(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "GRACE_S", 0.0)
    stop = StopRequest()
    rewrite = WeightWork.rewrite

    def ask(work: WeightWork, raw: Tensor, rows: range, out: Tensor) -> Ticket:
        if work.step.name.endswith("up_proj.weight"):  # which has more tiles than one
            stop.signal_number = signal.SIGTERM
        return rewrite(work, raw, rows, out)

    monkeypatch.setattr(WeightWork, "rewrite", ask)
    with pytest.raises(Stopped):
        carry_out(plan, sink := Recorder(), stop=stop)
    assert sink.calls[-1] == "halt"
    assert len(sink.shards[sink.shard]) > (sink.boundaries[sink.shard] or [0])[-1]


def test_an_error_is_told_rather_than_the_stop_it_met(plan: Plan) -> None:
    def fail(number: int, call: str) -> None:
        if call == "halt":
            raise ResourceError("the disk is full")

    with pytest.raises(ResourceError):
        carry_out(plan, Recorder(fail), stop=StopRequest(signal.SIGTERM))


@pytest.mark.parametrize("at", range(5))
def test_a_thread_that_cannot_be_had_ends_the_run_and_all_others(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """As at the limit of processes of a container: one of the three of a lane, or of those that compute."""
    start: Callable[..., int] = vars(threads)["start_new_thread"]
    calls: list[int] = []

    def refuse(*given: Any) -> int:
        calls.append(1)
        if len(calls) > at:
            raise RuntimeError("can't start new thread")
        return start(*given)

    monkeypatch.setattr(threads, "start_new_thread", refuse)
    with pytest.raises(ResourceError, match="no thread can be started"):
        carry_out(plan, Recorder())
    assert len(calls) > at


def test_threads_that_end_without_a_word_are_no_success(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(lanes.Run, "guarded", lambda run, work: None)
    with pytest.raises(ResourceError, match="without a word"):
        carry_out(plan, Recorder())


# -- several outputs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{}, {"merge_base": "nf4-dq"}], ids=["F", "T"])
def plans(request: pytest.FixtureRequest, base: Path, adapter: Path) -> tuple[Plan, ...]:
    """16 bit, nf4-dq and int8: onto T, weights that are not adapted are rewritten too, and read twice."""
    job = Job(str(base), str(adapter), MergeOptions(**request.param), "cpu", also=("nf4-dq", "int8"))
    memory = Memory(0, 0, TILE, 2)
    return tuple(dataclasses.replace(plan, memory=memory) for plan in prepare(job).plans)


@pytest.fixture(scope="module")
def wholes(plans: Sequence[Plan]) -> list[Recorder]:
    """What each output is when it is made alone."""
    return [carry_out(plan, Recorder()) for plan in plans]


def carry_out_all(
    plans: Sequence[Plan],
    sinks: Sequence[Recorder],
    starts: Sequence[Mapping[str, int]] | None = None,
    stop: StopRequest | None = None,
) -> Sequence[Recorder]:
    """In one pass; all sinks are let go of, whatever happens."""
    starts = starts or [from_the_start(plan) for plan in plans]
    outputs = [
        Output(plan, each, lambda sink=sink: sink)  # type: ignore[misc]  # a lambda's default has no type
        for plan, each, sink in zip(plans, starts, sinks, strict=True)
    ]
    began = time.monotonic()
    try:
        run_plans(outputs, quiet, stop or StopRequest())
    finally:
        assert time.monotonic() - began < 60
        assert all(sink.closed for sink in sinks)
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("streamconv")]
    return sinks


def test_several_outputs_are_those_of_a_run_each_and_the_base_is_read_once(
    plans: Sequence[Plan], wholes: Sequence[Recorder], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    read_into = TensorReader.read_into

    def counting(reader: TensorReader, tensor: StoredTensor, start: int, out: memoryview) -> None:
        nonlocal read
        read += len(out) if Path(tensor.file.path).parent == base else 0
        read_into(reader, tensor, start, out)

    monkeypatch.setattr(TensorReader, "read_into", counting)
    sinks = carry_out_all(plans, [Recorder() for _ in plans])
    for sink, whole in zip(sinks, wholes, strict=True):
        assert bytes_of(sink) == bytes_of(whole)
        assert sink.sums == whole.sums
        assert sink.drained
        assert sink.threads == {"streamconv-writer"}
    alone = [bytes_read([plan]) for plan in plans]
    assert read == bytes_read(plans) == max(alone) < sum(alone)


def test_several_outputs_can_go_on_from_boundaries_of_their_own(
    plans: Sequence[Plan], wholes: Sequence[Recorder]
) -> None:
    together = carry_out_all(plans, [Recorder() for _ in plans])
    for place in range(6):
        starts, cuts = [], []
        for number, plan in enumerate(plans):
            shard = plan.shards[(place + number) % len(plan.shards)]
            boundaries = together[number].boundaries[shard.name]
            cut = boundaries[(7 * place + 5 * number) % len(boundaries)]
            starts.append({shard.name: len(shard.header) + cut})
            cuts.append((shard.name, cut))
        for sink, whole, (name, cut) in zip(
            carry_out_all(plans, [Recorder() for _ in plans], starts), wholes, cuts, strict=True
        ):
            assert bytes_of(sink) == {name: bytes(whole.shards[name][cut:])}


def test_one_output_that_is_complete_lets_the_others_be_made(
    plans: Sequence[Plan], wholes: Sequence[Recorder]
) -> None:
    starts = [from_the_start(plans[0]), {}, from_the_start(plans[2])]
    sinks = carry_out_all(plans, [Recorder() for _ in plans], starts)
    assert [bytes_of(sink) for sink in sinks] == [bytes_of(wholes[0]), {}, bytes_of(wholes[2])]


def test_an_error_of_one_output_ends_all(plans: Sequence[Plan], wholes: Sequence[Recorder]) -> None:
    for number, whole in enumerate(wholes):
        calls = len(whole.calls)
        for at in (1, 6, calls // 2):
            sinks = [Recorder() for _ in plans]
            sinks[number] = Recorder(failing_at(at))
            with pytest.raises(OddError, match=f"number {at}$"):
                carry_out_all(plans, sinks)


def test_a_stop_request_ends_every_output_at_a_boundary_of_its_own(
    plans: Sequence[Plan], wholes: Sequence[Recorder]
) -> None:
    """A shared tensor, rewritten for one output and copied to another, ends with a boundary of both."""
    halted = 0
    for at in range(2, len(wholes[1].calls), 25):
        stop = StopRequest()
        sinks = [Recorder(), Recorder(stopping_at(at, stop)), Recorder()]
        with contextlib.suppress(Stopped):
            carry_out_all(plans, sinks, stop=stop)
        for sink in sinks:
            if sink.calls[-1] == "halt" and sink.shard:
                assert len(sink.shards[sink.shard]) == (sink.boundaries[sink.shard] or [0])[-1]
                halted += 1
    assert halted > 6


# -- memory ------------------------------------------------------------------------------------------------------


def test_buffers_are_allocated_once_and_are_as_many_as_planned(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    host_buffer = DirectEngine.host_buffer

    def counted(engine: DirectEngine, nbytes: int) -> Tensor:
        sizes.append(nbytes)
        return host_buffer(engine, nbytes)

    monkeypatch.setattr(DirectEngine, "host_buffer", counted)
    carry_out(plan, Recorder())
    size = plan.memory.buffer + BLOCK  # to choose how bytes lie in it
    assert sizes == [size] * (2 * SLOTS)
    sizes.clear()
    carry_out_all([plan] * 3, [Recorder() for _ in range(3)])
    assert sizes == [size] * (4 * SLOTS)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Sequence[int]:
    """How many weights' adapters were in memory, each time one had been read."""
    load = TensorReader.load
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[int] = []

    def noting(reader: TensorReader, stored: Any) -> Tensor:
        tensor = load(reader, stored)
        if stored.name.endswith("lora_B.weight"):
            alive.add(tensor)
            counts.append(len(alive))
        return tensor

    monkeypatch.setattr(TensorReader, "load", noting)
    return counts


def test_the_reader_runs_ahead_by_one_weight_only(base: Path, tmp_path: Path, loaded: Sequence[int]) -> None:
    """However small the weights: the buffers would let it hold four."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    plan = planned(base, write_adapter(tmp_path / "adapter", SIZES.shapes, targets=targets))
    slow = Recorder(lambda number, call: time.sleep(0.01))
    carry_out(dataclasses.replace(plan, memory=Memory(0, 0, 2**20, 1)), slow)
    assert len(loaded) == len(targets) * SIZES.layers
    assert max(loaded) == WEIGHTS_HELD


def test_threads_inside_torch_are_as_before(plan: Plan) -> None:
    before = torch.get_num_threads()
    carry_out(plan, Recorder())
    with pytest.raises(OddError):
        carry_out(plan, Recorder(failing_at(2)))
    assert torch.get_num_threads() == before
