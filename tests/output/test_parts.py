"""Parts put together: interrupted at whatever moment and repeated, what workers have made is taken over."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv.checkpoint.own_files import identify
from streamconv.errors import OutputError
from streamconv.output.journal import (
    Journal,
    Watermark,
    check_no_part_at_work,
    lock_holder,
    make_pass_folder,
    part_at_work,
)
from streamconv.output.parts import adopt, finished_shards, partial_bytes
from streamconv.output.work_folder import part_folders

RUN = {"options": {"quant": "keep"}, "output": "all of it"}
SUMS = {"weight": [1.0, 2.0, 0.0]}
SHARDS = [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]


class Killed(BaseException):
    """The end of a process, as far as what it runs can tell."""


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Journal]:
    """The journal of an output of which two workers have left three shards, and a fourth in part."""
    with Journal(tmp_path, RUN, resume=True, worker="part 1 of 2") as journal:
        leave(journal, "part-1-of-2", SHARDS[:2], SHARDS[2], 100)
        leave(journal, "part-2-of-2", SHARDS[3:], SHARDS[2], 50)
        yield journal


def leave(whole: Journal, name: str, finished: list[str], begun: str, offset: int) -> None:
    make_pass_folder(whole.folder, name)
    with Journal(whole.out, RUN, resume=True, part=name, worker=name) as journal:
        for shard in finished:
            journal.finished(shard).write_bytes(shard.encode())
            found = identify(journal.finished(shard), lambda _: None)
            assert found is not None
            journal.identities[shard] = found
            journal.finish(shard, found.sha256, {shard: SUMS["weight"]})
        journal.partial(begun).write_bytes(name.encode())
        journal.watermark(begun, Watermark(offset, "a" * 64), {})


def check_adopted(whole: Journal) -> None:
    assert set(whole.progress.finished) == {*SHARDS[:2], SHARDS[3]}
    for shard in whole.progress.finished:
        assert whole.finished(shard).read_bytes() == shard.encode()
        assert whole.progress.sums[shard] == SUMS["weight"]
    assert whole.progress.watermarks[SHARDS[2]].offset == 100
    assert whole.partial(SHARDS[2]).read_bytes() == b"part-1-of-2", "that with more bytes"
    assert part_folders(whole.folder) == []


def test_what_parts_have_made_becomes_that_of_the_whole(whole: Journal) -> None:
    assert finished_shards(whole) == {*SHARDS[:2], SHARDS[3]}
    assert whole.progress.finished == {}
    assert partial_bytes(whole) == 2 * len("part-1-of-2")
    adopt(whole)
    check_adopted(whole)
    assert whole.sightings.keys() == whole.progress.finished.keys()


def test_only_those_of_another_number(whole: Journal) -> None:
    adopt(whole, count=2)
    assert len(part_folders(whole.folder)) == 2
    adopt(whole, count=3)
    check_adopted(whole)


@pytest.mark.parametrize("at", range(30))
def test_it_may_be_interrupted_anywhere(whole: Journal, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """By a kill before any call that changes the disk."""
    count = 0
    with monkeypatch.context() as patches:
        for name in ("replace", "unlink", "rmdir", "write"):
            call = getattr(os, name)

            def counted(*given: object, call: object = call) -> object:
                nonlocal count
                count += 1
                if count > at:
                    raise Killed
                assert callable(call)
                return call(*given)

            patches.setattr(os, name, counted)
        with contextlib.suppress(Killed):
            adopt(whole)
    whole.close()
    with Journal(whole.out, RUN, resume=True) as again:
        adopt(again)
        check_adopted(again)
        again.remove()
    assert not again.folder.exists()


def test_a_worker_is_told_of_by_the_lock_of_its_part(tmp_path: Path) -> None:
    with Journal(tmp_path, RUN, resume=True, worker="part 2 of 4") as whole:
        make_pass_folder(whole.folder, "part-2-of-4")
    part = Journal(tmp_path, RUN, resume=True, part="part-2-of-4", worker="part 2 of 4")
    assert part_at_work(whole.folder) is None
    with part:
        held = part_at_work(whole.folder)
        assert held is not None
        assert held.startswith(f"part 2 of 4, process {os.getpid()} on ")
        assert lock_holder(tmp_path) == held
        assert part_at_work(whole.folder, but="part-2-of-4") is None
        other = Journal(tmp_path, {**RUN, "more": 1}, resume=True)
        with pytest.raises(OutputError, match="holds an unfinished run with other inputs or options"), other:
            pass
        for resume in (True, False):
            with (
                pytest.raises(
                    OutputError, match=r"in use by another run \(part 2 of 4, process .* which makes a part"
                ),
                Journal(tmp_path, {**RUN, "more": 1} if not resume else RUN, resume=resume) as anew,
            ):
                check_no_part_at_work(anew)
    assert lock_holder(tmp_path) is None


def test_the_journal_of_a_part_says_by_what_to_know_its_files(whole: Journal) -> None:
    lines = (whole.folder / "part-2-of-2" / "journal.jsonl").read_text().splitlines()
    seen = json.loads(lines[0])
    path = whole.folder / "part-2-of-2" / SHARDS[3]
    found = path.stat()
    assert (seen["identity"], seen["inode"], seen["size"]) == (path.name, found.st_ino, found.st_size)
    assert seen["modified_ns"] == found.st_mtime_ns
