"""The sink of an output folder: watermarks, finished shards, and where a rerun goes on."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from streamconv.errors import OutputError
from streamconv.output import sink as sink_module
from streamconv.output.journal import Journal, Watermark
from streamconv.output.sink import ShardSink, resume_points
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.running.cell import KeptDelta
from tests.output.shards import content, opened, released, write_all


def test_a_watermark_is_set_at_the_first_boundary_after_enough_bytes(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "WATERMARK_BYTES", 100)
    shard = plan.shards[0]
    body = memoryview(content(shard))[len(shard.header) :]
    with opened(out, plan) as journal:
        sink = ShardSink(journal, {})
        sink.begin(shard)
        start = len(shard.header)
        sink.write(body[:99], released)
        sink.boundary({"a": KeptDelta(1.0, 2.0, 3.0)})
        assert journal.progress.watermarks == {}
        sink.write(body[99:150], released)
        sink.write(body[150:160], released)
        assert journal.progress.watermarks == {}  # not in the middle of a weight
        sink.boundary({"b": KeptDelta(4.0, 5.0, 6.0)})
        sink.drain()
        digest = hashlib.sha256(content(shard)[: start + 160]).hexdigest()
        assert journal.progress.watermarks == {shard.name: Watermark(start + 160, digest)}
        assert journal.progress.sums == {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}
        sink.write(body[160:200], released)
        sink.boundary({"c": KeptDelta(7.0, 8.0, 9.0)})
        assert journal.progress.watermarks[shard.name].offset == start + 160
        sink.halt()  # a stop keeps what the last boundary had
        sink.drain()
        assert journal.progress.watermarks[shard.name].offset == start + 200
        assert "c" in journal.progress.sums
        sink.write(body[200:210], released)
        sink.halt()  # but not a part of a weight
        sink.drain()
        assert journal.progress.watermarks[shard.name].offset == start + 200
        sink.close()


def test_a_finished_shard_is_journaled_with_hash_and_sums_and_waits_in_the_work_folder(
    out: Path, plan: Plan
) -> None:
    shard = plan.shards[0]
    with opened(out, plan) as journal:
        sink = ShardSink(journal, {})
        sink.begin(shard)
        sink.write(memoryview(content(shard))[len(shard.header) :], released)
        sink.boundary({"a": KeptDelta(1.0, 2.0, 3.0)})
        sink.end()
        sink.drain()
        assert journal.progress.finished == {shard.name: hashlib.sha256(content(shard)).hexdigest()}
        assert journal.progress.sums == {"a": [1.0, 2.0, 3.0]}
        assert journal.finished(shard.name).read_bytes() == content(shard)
        assert not journal.partial(shard.name).exists()
    assert os.listdir(out) == [".streamconv"]


def test_a_disk_that_fails_behind_the_writer_is_what_is_told(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync fails in a thread of its own, while this one goes on writing: it meets the same error, and no other."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sink_module, "WATERMARK_BYTES", 10)
    monkeypatch.setattr(os, "fdatasync", fail)
    shard = plan.shards[0]
    body = memoryview(content(shard))[len(shard.header) :]
    with opened(out, plan) as journal:
        sink = ShardSink(journal, {})
        sink.begin(shard)

        def write() -> None:
            for start in range(0, len(body), 10):
                sink.write(body[start : start + 10], released)
                sink.boundary({})

        with pytest.raises(OutputError, match="partial cannot be written: Input/output error"):
            write()
        sink.close()
        assert journal.progress.watermarks == {}


# -- going on ----------------------------------------------------------------------------------------------------


def half_made(journal: Journal, shard: ShardPlan, extra: int = 300) -> None:
    """Leave a shard with a watermark at 200 bytes of its body, and `extra` bytes after it."""
    body = memoryview(content(shard))[len(shard.header) :]
    sink = ShardSink(journal, {})
    sink.begin(shard)
    sink.write(body[:200], released)
    sink.boundary({})
    sink.halt()
    sink.drain()
    sink.write(body[200 : 200 + extra], released)
    sink.close()


def test_a_rerun_goes_on_from_finished_shards_and_watermarks(out: Path, plan: Plan) -> None:
    first, second, third = plan.shards
    with opened(out, plan) as journal:
        write_all(journal, [first])
        half_made(journal, second)
    with opened(out, plan) as journal:
        starts, writers = resume_points(out, plan, journal)
        assert starts == {second.name: len(second.header) + 200, third.name: len(third.header)}
        sink = ShardSink(journal, writers)
        sink.begin(second)
        sink.write(memoryview(content(second))[starts[second.name] :], released)
        sink.boundary({})
        sink.end()
        sink.drain()
        assert journal.finished(second.name).read_bytes() == content(second)
        assert journal.progress.finished[second.name] == hashlib.sha256(content(second)).hexdigest()


@pytest.mark.parametrize("harm", ["changed", "shortened", "gone"])
def test_a_partial_shard_that_is_not_what_was_journaled_is_made_anew(
    out: Path, plan: Plan, harm: str
) -> None:
    shard = plan.shards[0]
    with opened(out, plan) as journal:
        half_made(journal, shard)
        partial = journal.partial(shard.name)
    match harm:
        case "changed":
            with partial.open("r+b") as file:
                file.seek(len(shard.header) + 150)
                file.write(b"\0")
        case "shortened":
            os.truncate(partial, len(shard.header) + 199)
        case "gone":
            partial.unlink()
    for _ in range(2):  # and that is remembered
        with opened(out, plan) as journal:
            starts, writers = resume_points(out, plan, journal)
            assert starts[shard.name] == len(shard.header)
            assert not writers
    with opened(out, plan) as journal:
        write_all(journal, [shard])
        assert journal.finished(shard.name).read_bytes() == content(shard)


def test_killed_between_journal_and_rename_a_shard_is_still_finished(out: Path, plan: Plan) -> None:
    shard = plan.shards[0]
    with opened(out, plan) as journal:
        write_all(journal, [shard])
        journal.finished(shard.name).rename(journal.partial(shard.name))
    with opened(out, plan) as journal:
        starts, _ = resume_points(out, plan, journal)
        assert shard.name not in starts
        assert journal.finished(shard.name).exists()


def test_a_finished_shard_that_is_gone_is_made_anew(out: Path, plan: Plan) -> None:
    shard = plan.shards[0]
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        journal.finished(shard.name).unlink()
    with opened(out, plan) as journal:
        starts, _ = resume_points(out, plan, journal)
        assert starts == {shard.name: len(shard.header)}
        assert shard.name not in journal.progress.finished


def test_a_shard_of_the_model_to_be_replaced_is_not_taken_for_a_new_one(out: Path, plan: Plan) -> None:
    """It may well have the same name and size."""
    shard = plan.shards[0]
    (out / shard.name).write_bytes(bytes(shard.size))
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        journal.finished(shard.name).unlink()
    with opened(out, plan) as journal:
        assert resume_points(out, plan, journal)[0] == {shard.name: len(shard.header)}


def test_a_published_shard_is_done(out: Path, plan: Plan) -> None:
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        journal.publish()
        journal.finished(plan.shards[0].name).rename(out / plan.shards[0].name)
    with opened(out, plan) as journal:
        assert resume_points(out, plan, journal) == ({}, {})


def test_the_shards_of_these_tests_differ(plan: Plan) -> None:
    assert len({content(shard)[-1:] for shard in plan.shards}) == len(plan.shards) == 3
