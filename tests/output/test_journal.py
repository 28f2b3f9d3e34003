"""The work folder: whose it is, what it remembers after any kill, its lock, and how it goes away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import OutputError, ResourceError
from streamconv.output.journal import (
    WORK_FOLDER,
    Journal,
    Progress,
    Watermark,
    is_owned,
    is_publishing,
    remove_leftovers,
)

RUN = {"torch": "2.10", "options": {"quant": "keep", "seed": 0}, "base": {"a.safetensors": {"size": 7}}}
OTHER = {"torch": "2.10", "options": {"quant": "nf4", "seed": 0}, "base": {"a.safetensors": {"size": 7}}}
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def lines(out: Path) -> Path:
    return out / WORK_FOLDER / "journal.jsonl"


def fill(out: Path) -> list[Progress]:
    """A run that did some of everything; what it knew after every line."""
    known = []
    with Journal(out, RUN, resume=True) as journal:
        steps: list[Callable[[], None]] = [
            lambda: journal.watermark(A, Watermark(4096, "aa"), {"w": [0.1, 1 / 3, 0.0]}),
            lambda: journal.watermark(A, Watermark(8192, "ab"), {}),
            lambda: journal.finish(A, "ac", {"v": [1e-300, 2.5, 0.0]}),
            lambda: journal.watermark(B, Watermark(4096, "ba"), {"é\n": [0.5, 0.5, 0.5]}),
            lambda: journal.restart(B),
            lambda: journal.finish(B, "bc", {}),
            journal.publish,
        ]
        known.append(copy_of(journal.progress))
        for step in steps:
            step()
            known.append(copy_of(journal.progress))
    return known


def copy_of(progress: Progress) -> Progress:
    return Progress(
        dict(progress.finished),
        dict(progress.watermarks),
        dict(progress.sums),
        progress.publishing,
        progress.rejected,
    )


def test_a_rerun_knows_what_was_done(tmp_path: Path) -> None:
    last = fill(tmp_path)[-1]
    assert last == Progress(
        finished={A: "ac", B: "bc"},
        watermarks={A: Watermark(8192, "ab")},
        sums={"w": [0.1, 1 / 3, 0.0], "v": [1e-300, 2.5, 0.0], "é\n": [0.5, 0.5, 0.5]},
        publishing=True,
    )
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress == last


def test_torn_anywhere_it_knows_what_whole_lines_say_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # many lengths, little time
    known = fill(tmp_path)
    content = lines(tmp_path).read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    near_an_end = {end + place for end in ends for place in (-2, -1, 0, 1, 2)}
    for length in sorted({0, *range(0, len(content), 9), *near_an_end} & {*range(len(content) + 1)}):
        lines(tmp_path).write_bytes(content[:length])
        expected = known[sum(end <= length for end in ends)]
        with Journal(tmp_path, RUN, resume=True) as journal:
            assert journal.progress == expected, f"cut after {length} bytes"
            journal.watermark(B, Watermark(5, "new"), {})
        with Journal(tmp_path, RUN, resume=True) as journal:
            assert journal.progress.watermarks[B] == Watermark(5, "new"), f"cut after {length} bytes"


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b'{"finished": \n', b"[]\n", b"\xff\xfe\n"])
def test_a_damaged_line_ends_what_is_believed(tmp_path: Path, damage: bytes) -> None:
    """A power cut may leave zeros, or an old disk anything; what comes after is done again."""
    known = fill(tmp_path)
    content = lines(tmp_path).read_bytes().splitlines(keepends=True)
    lines(tmp_path).write_bytes(b"".join(content[:3]) + damage + b"".join(content[4:]))
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress == known[3]
        journal.finish(B, "new", {})
    assert len(lines(tmp_path).read_bytes().splitlines()) == 4


# -- whose it is -------------------------------------------------------------------------------------------------


def test_another_run_is_refused_naming_what_differs(tmp_path: Path) -> None:
    fill(tmp_path)
    before = lines(tmp_path).read_bytes()
    with (
        pytest.raises(OutputError, match=r'options\.quant: then "keep", now "nf4"') as caught,
        Journal(tmp_path, OTHER, resume=True),
    ):
        pass
    assert str(tmp_path) in str(caught.value)
    assert "--no-resume" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert lines(tmp_path).read_bytes() == before
    with Journal(tmp_path, RUN, resume=True) as journal:  # and its lock is free again
        assert journal.progress.publishing


def test_a_missing_and_a_new_field_are_named_too(tmp_path: Path) -> None:
    fill(tmp_path)
    now = {"torch": "2.10", "options": RUN["options"], "base": {"b.safetensors": {"size": 7}}}
    with (
        pytest.raises(
            OutputError, match=r"base\.a\.safetensors: then .*7.*, now null; base\.b\.safetensors: then null"
        ),
        Journal(tmp_path, now, resume=True),
    ):
        pass


def test_no_resume_discards_whatever_is_there(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / WORK_FOLDER / f"{A}.partial").write_bytes(b"x")
    with Journal(tmp_path, OTHER, resume=False) as journal:
        assert journal.progress == Progress()
        assert not journal.partial(A).exists()
    with Journal(tmp_path, OTHER, resume=True) as journal:
        assert journal.progress == Progress()


def test_a_rejected_run_may_be_replaced_and_may_be_repeated(tmp_path: Path) -> None:
    with Journal(tmp_path, RUN, resume=True) as journal:
        journal.finish(A, "ac", {})
        journal.reject()
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress.finished == {A: "ac"}
    with Journal(tmp_path, OTHER, resume=True) as journal:
        assert journal.progress == Progress()


def test_a_rejected_run_that_was_accepted_after_all_is_kept(tmp_path: Path) -> None:
    with Journal(tmp_path, RUN, resume=True) as journal:
        journal.finish(A, "ac", {})
        journal.reject()
        journal.publish()
    with pytest.raises(OutputError), Journal(tmp_path, OTHER, resume=True):
        pass


def test_a_run_that_had_nothing_to_lose_is_replaced(tmp_path: Path) -> None:
    """It was refused for want of disk space, say, and the user asks for a smaller result."""
    with Journal(tmp_path, RUN, resume=True):
        pass
    with Journal(tmp_path, OTHER, resume=True) as journal:
        assert journal.progress == Progress()


def test_publishing_is_known_from_outside_only_while_a_run_owns_the_folder(tmp_path: Path) -> None:
    assert not is_publishing(tmp_path)
    assert not is_owned(tmp_path)
    fill(tmp_path)
    assert is_publishing(tmp_path)
    assert is_owned(tmp_path)
    (tmp_path / WORK_FOLDER / "plan.json").unlink()
    assert not is_publishing(tmp_path)
    assert not is_owned(tmp_path)


def test_what_belongs_to_no_run_is_not_gone_on_with(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / WORK_FOLDER / "plan.json").unlink()
    (tmp_path / WORK_FOLDER / "folder").mkdir()
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress == Progress()
    assert sorted(os.listdir(tmp_path / WORK_FOLDER)) == ["journal.jsonl", "lock", "plan.json"]


def test_the_owner_is_forgotten_before_anything_else_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, it must not look like a run that has only lost its progress."""
    fill(tmp_path)
    unlink = os.unlink
    deleted: list[str] = []

    def noting(path: Any, **options: Any) -> None:
        deleted.append(Path(path).name)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", noting)
    with Journal(tmp_path, RUN, resume=True) as journal:
        journal.remove()
    assert deleted[0] == "plan.json"
    assert deleted[-1] == "lock"
    assert os.listdir(tmp_path) == []


# -- the lock ----------------------------------------------------------------------------------------------------


def test_a_second_run_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with Journal(tmp_path, RUN, resume=True) as first:
        first.finish(A, "ac", {})
        with (
            pytest.raises(
                OutputError, match=f"{tmp_path} is in use by another run .process {os.getpid()} on "
            ),
            Journal(tmp_path, RUN, resume=True),
        ):
            pass
        with pytest.raises(OutputError, match="is in use"), Journal(tmp_path, RUN, resume=False):
            pass
        first.finish(B, "bc", {})
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress.finished == {A: "ac", B: "bc"}


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run ends between our opening the lock file and our taking the lock."""
    flock = fcntl.flock
    ended: list[bool] = []

    def end_first(descriptor: int, operation: int) -> None:
        if not ended:
            ended.append(True)
            (tmp_path / WORK_FOLDER / "lock").unlink()
            (tmp_path / WORK_FOLDER).rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", end_first)
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert ended
        journal.finish(A, "ac", {})
        with pytest.raises(OutputError, match="is in use"), Journal(tmp_path, RUN, resume=True):
            pass


def test_a_file_system_without_locks_is_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", cannot)
    with (
        pytest.raises(OutputError, match="lock cannot be locked: No locks available"),
        Journal(tmp_path, RUN, True),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the folder"), Journal(tmp_path / "file", RUN, True):
        pass


# -- going away --------------------------------------------------------------------------------------------------


def test_removing_leaves_a_run_that_has_moved_in_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after our lock file is gone, and before the folder is."""
    close, newcomer = Journal.close, Journal(tmp_path, OTHER, resume=True)

    def close_and_move_in(journal: Journal) -> None:
        close(journal)
        monkeypatch.setattr(Journal, "close", close)
        newcomer.__enter__()

    with Journal(tmp_path, RUN, resume=True) as journal:
        monkeypatch.setattr(Journal, "close", close_and_move_in)
        journal.remove()
    newcomer.finish(A, "ac", {})
    newcomer.close()
    with Journal(tmp_path, OTHER, resume=True) as journal:
        assert journal.progress.finished == {A: "ac"}


def test_leftovers_go_and_what_is_owned_or_locked_stays(tmp_path: Path) -> None:
    remove_leftovers(tmp_path)
    fill(tmp_path)
    remove_leftovers(tmp_path)
    assert is_owned(tmp_path)
    (tmp_path / WORK_FOLDER / "plan.json").unlink()
    with Journal(tmp_path / "other", RUN, resume=True):
        pass
    holder = Journal(tmp_path, RUN, resume=True)
    holder.lock()
    remove_leftovers(tmp_path)
    assert lines(tmp_path).exists()
    holder.close()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["other"]


# -- errors of the disk ------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_resource_error_and_the_line_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    written: list[bool] = []

    def half_then_full(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(True)
        return write(descriptor, data[: len(data) // 2])

    with Journal(tmp_path, RUN, resume=True) as journal:
        journal.finish(A, "ac", {})
        monkeypatch.setattr(os, "write", half_then_full)
        with pytest.raises(ResourceError, match=r"journal\.jsonl: the disk is full"):
            journal.finish(B, "bc", {})
        assert B not in journal.progress.finished
    monkeypatch.undo()
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress.finished == {A: "ac"}
        journal.finish(B, "bc", {})
    assert [json.loads(line)["sha256"] for line in lines(tmp_path).read_text().splitlines()] == ["ac", "bc"]


def test_a_line_is_written_in_full_even_if_not_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    known = fill(tmp_path)
    monkeypatch.undo()
    with Journal(tmp_path, RUN, resume=True) as journal:
        assert journal.progress == known[-1]


def test_a_failed_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal(tmp_path, RUN, resume=True) as journal:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match=r"journal\.jsonl cannot be written: Input/output error"):
            journal.publish()
        monkeypatch.undo()
