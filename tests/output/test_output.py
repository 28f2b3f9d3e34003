"""The output folder: who may write to it, where a rerun goes on, and the order in which a result appears."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from streamconv.checkpoint.writer import ShardWriter
from streamconv.errors import CheckpointError, OutputError, ResourceError
from streamconv.output import place
from streamconv.output import sink as sink_module
from streamconv.output.journal import Journal, Watermark
from streamconv.output.place import check_disk, check_place
from streamconv.output.publish import publish_output
from streamconv.output.sidecars import CHAT_TEMPLATES
from streamconv.output.sink import ShardSink, resume_points
from streamconv.pipeline import Job, prepare
from streamconv.planning.plan import MergeOptions, Plan, ShardPlan
from streamconv.running.cells import KeptDelta
from streamconv.storage import open_storage
from tests.models import Sizes, write_base

SIZES = Sizes(hidden=32, inner=40, layers=1, vocabulary=50)
GENERATED = {
    "model.safetensors.index.json": b"{}",
    "README.md": b"# new",
    "streamconv.json": b"{}",
    "config.json": b'{"new": true}',
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    base = write_base(tmp_path_factory.mktemp("output") / "base", SIZES.shapes, shards=3)
    return prepare(Job(str(base), None, MergeOptions(), "cpu")).plan


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def content(shard: ShardPlan) -> bytes:
    """What a shard is made of in these tests: its header, then the last digit of its number, over and over."""
    return shard.header.ljust(shard.size, shard.name[len("model-0000") :][:1].encode())


def opened(out: Path, plan: Plan) -> Journal:
    return Journal(out, plan.fingerprint, resume=True)


def released() -> None:
    """The buffers here are not used again."""


def write_all(journal: Journal, shards: Sequence[ShardPlan]) -> None:
    sink = ShardSink(journal, {})
    for shard in shards:
        sink.begin(shard)
        sink.write(memoryview(content(shard))[len(shard.header) :], released)
        sink.boundary({})
        sink.end()
    sink.drain()
    sink.close()


# -- who may write -----------------------------------------------------------------------------------------------


def test_an_empty_folder_a_new_one_and_an_unfinished_run_may_be_written_to(out: Path) -> None:
    check_place(out, {}, overwrite=False, publishing=False)
    check_place(out / "new", {}, overwrite=False, publishing=False)
    (out / ".streamconv").mkdir()
    check_place(out, {}, overwrite=False, publishing=False)


def test_a_folder_with_anything_in_it_is_refused_naming_some(out: Path) -> None:
    for name in ("b.txt", "a.txt", "d", "c.json"):
        (out / name).touch()
    with pytest.raises(
        OutputError, match=rf"{out} is not empty \(a\.txt, b\.txt, c\.json \.\.\.\).*--overwrite"
    ):
        check_place(out, {}, overwrite=False, publishing=False)
    check_place(out, {}, overwrite=True, publishing=False)
    check_place(out, {}, overwrite=False, publishing=True)


def test_a_file_is_refused(out: Path) -> None:
    (out / "file").touch()
    with pytest.raises(OutputError, match="file is not a folder"):
        check_place(out / "file", {}, overwrite=True, publishing=False)


@pytest.mark.parametrize("place", [".", "base", "base/inside", "link", "link/new", "base/../base"])
def test_a_place_that_overlaps_an_input_is_refused_whatever_was_asked_for(tmp_path: Path, place: str) -> None:
    (tmp_path / "base" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("base")
    inputs = {"base": tmp_path / "base"}
    with pytest.raises(OutputError, match="overlap, and inputs are never written to"):
        check_place(tmp_path / place, inputs, overwrite=True, publishing=True)
    check_place(tmp_path / "base-merged", inputs, overwrite=False, publishing=False)


# -- disk --------------------------------------------------------------------------------------------------------


def test_free_space_is_compared_with_what_is_still_to_be_taken(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [shard.size for shard in plan.shards]
    spare = place.SPARE_DISK_BYTES
    with opened(out, plan) as journal:
        # Half made: what it has reserved needs no space a second time.
        ShardWriter.create(journal.partial(plan.shards[0].name), plan.shards[0].header, sizes[0]).close()
        needed = spare + sizes[1] + sizes[2]
        monkeypatch.setattr(place, "free_bytes", lambda path: needed)
        check_disk([(out, plan, plan.shards, journal)])
        monkeypatch.setattr(place, "free_bytes", lambda path: needed - 1)
        with pytest.raises(ResourceError, match=rf"{out} needs .* 1 B are missing"):
            check_disk([(out, plan, plan.shards, journal)])
        check_disk([(out, plan, plan.shards[:1], journal)])
        monkeypatch.setattr(place, "free_bytes", lambda path: spare)
        check_disk([(out, plan, (), journal)])


def test_a_sparse_partial_file_has_taken_nothing(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = plan.shards[0]
    monkeypatch.setattr(place, "free_bytes", lambda path: place.SPARE_DISK_BYTES + shard.size - 1)
    with opened(out, plan) as journal:
        with journal.partial(shard.name).open("wb") as file:
            file.truncate(shard.size)
        with pytest.raises(ResourceError, match="1 B are missing"):
            check_disk([(out, plan, [shard], journal)])


def test_the_space_is_that_of_the_outputs_own_disk(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def statvfs(path: Path) -> os.statvfs_result:
        asked.append(Path(path))
        return os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))  # says nothing, as some FUSE ones

    with opened(out, plan) as journal:
        monkeypatch.setattr(os, "statvfs", statvfs)
        check_disk([(out, plan, plan.shards, journal)])
        assert asked == [out]


# -- the sink ----------------------------------------------------------------------------------------------------


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


# -- publishing --------------------------------------------------------------------------------------------------


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names as they vanish (`- name`) and appear in the output folder."""
    seen: list[str] = []
    replace, unlink = os.replace, os.unlink

    def noting_replace(source: Any, target: Any) -> None:
        seen.append(Path(target).name)
        replace(source, target)

    def noting_unlink(path: Any, **options: Any) -> None:
        existed = Path(path).exists()
        unlink(path, **options)
        if existed and not Path(path).name.endswith(".partial"):
            seen.append(f"- {Path(path).name}")

    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(os, "unlink", noting_unlink)
    return seen


def test_config_goes_first_and_comes_last(out: Path, plan: Plan, tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("new")
    (tmp_path / "base" / "empty.txt").touch()
    storage = open_storage(str(tmp_path / "base"))
    kept = ("notes.txt", "LICENSE", "model.bin")
    for name in (*kept, "config.json", "model.safetensors", "chat_template.jinja", "adapter_config.json"):
        (out / name).write_text("old")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        order.clear()
        publish_output(
            out, plan, journal, (storage.file("empty.txt"), storage.file("tokenizer.json")), GENERATED
        )
    gone = {"- model.safetensors", "- chat_template.jinja", "- adapter_config.json"}
    assert order[0] == "- config.json"
    assert set(order[1:4]) == gone
    shards = [shard.name for shard in plan.shards]
    assert order[4:] == [*shards, "empty.txt", "tokenizer.json", *GENERATED]
    assert sorted(os.listdir(out)) == sorted([".streamconv", *order[4:], *kept])
    assert (out / "tokenizer.json").read_text() == "new"
    assert (out / "config.json").read_bytes() == GENERATED["config.json"]
    for shard in plan.shards:
        assert (out / shard.name).read_bytes() == content(shard)


def test_publishing_can_be_repeated(out: Path, plan: Plan) -> None:
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        for _ in range(2):
            publish_output(out, plan, journal, (), GENERATED)
        assert journal.progress.publishing
    assert {name: (out / name).read_bytes() for name in GENERATED} == GENERATED


def test_a_file_to_copy_that_changed_since_is_refused(out: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("planned")
    file = open_storage(str(tmp_path / "base")).file("tokenizer.json")
    (tmp_path / "base" / "tokenizer.json").write_text("and changed")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json changed"):
            publish_output(out, plan, journal, (file,), GENERATED)
    assert not (out / "config.json").exists()


def test_old_chat_templates_make_way(out: Path, plan: Plan, tmp_path: Path) -> None:
    base, templates = tmp_path / "base" / CHAT_TEMPLATES, out / CHAT_TEMPLATES
    base.mkdir(parents=True)
    templates.mkdir()
    (base / "rag.jinja").write_text("new")
    for name in ("rag.jinja", "tool_use.jinja", "notes.txt"):
        (templates / name).write_text("old")
    file = open_storage(str(tmp_path / "base")).file(f"{CHAT_TEMPLATES}/rag.jinja")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        publish_output(out, plan, journal, (file,), GENERATED)
        assert {path.name: path.read_text() for path in templates.iterdir()} == {
            "rag.jinja": "new",
            "notes.txt": "old",
        }
        publish_output(out, plan, journal, (), GENERATED)
        assert [path.name for path in templates.iterdir()] == ["notes.txt"]
        (templates / "notes.txt").unlink()
        publish_output(out, plan, journal, (), GENERATED)
    assert not templates.exists()


def test_chat_templates_are_not_written_through_a_link(out: Path, plan: Plan, tmp_path: Path) -> None:
    base, elsewhere = tmp_path / "base" / CHAT_TEMPLATES, tmp_path / "elsewhere"
    base.mkdir(parents=True)
    elsewhere.mkdir()
    (base / "rag.jinja").write_text("new")
    (elsewhere / "tool_use.jinja").write_text("of another model")
    (out / CHAT_TEMPLATES).symlink_to(elsewhere)
    file = open_storage(str(tmp_path / "base")).file(f"{CHAT_TEMPLATES}/rag.jinja")
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        publish_output(out, plan, journal, (file,), GENERATED)
    assert os.listdir(elsewhere) == ["tool_use.jinja"]
    assert not (out / CHAT_TEMPLATES).is_symlink()
    assert (out / CHAT_TEMPLATES / "rag.jinja").read_text() == "new"


def test_a_folder_in_the_place_of_a_file_is_an_error_of_ours(out: Path, plan: Plan) -> None:
    (out / "config.json").mkdir()
    with opened(out, plan) as journal:
        write_all(journal, plan.shards)
        with pytest.raises(OutputError, match=r"config\.json cannot be written: Is a directory"):
            publish_output(out, plan, journal, (), GENERATED)


def test_the_shards_of_these_tests_differ(plan: Plan) -> None:
    assert len({content(shard)[-1:] for shard in plan.shards}) == len(plan.shards) == 3
