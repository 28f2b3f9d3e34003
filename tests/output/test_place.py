"""The output folder: who may write to it, and whether its disk has room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamconv.checkpoint.writer import ShardWriter
from streamconv.errors import OutputError, ResourceError
from streamconv.output import place
from streamconv.output.place import check_disk, check_place, check_reachable
from streamconv.planning.plan import Plan
from tests.output.shards import opened

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
    check_place(out, {}, overwrite=False, publishing=True)
    with pytest.raises(OutputError, match=r"holds a\.txt, b\.txt, c\.json \.\.\. and no model"):
        check_place(out, {}, overwrite=True, publishing=False)
    (out / "config.json").touch()
    check_place(out, {}, overwrite=True, publishing=False)


def test_a_repository_that_waits_for_its_model_takes_one(tmp_path: Path) -> None:
    for name in ("README.md", ".gitattributes", ".gitignore", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    check_place(tmp_path, {}, overwrite=True, publishing=False)
    with pytest.raises(OutputError, match="is not empty"):
        check_place(tmp_path, {}, overwrite=False, publishing=False)


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
        with pytest.raises(ResourceError, match="1 B are missing"):
            check_disk([(out, plan, (), journal)], copied_bytes=spare // 2 + 1)


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


def test_what_goes_along_counts_where_it_is_more_than_a_tokenizer(
    out: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a licence that a stranger has made a hole of 8 TB."""
    spare = place.SPARE_DISK_BYTES
    monkeypatch.setattr(place, "free_bytes", lambda path: spare)
    with opened(out, plan) as journal:
        check_disk([(out, plan, (), journal)], copied_bytes=spare // 2)
        with pytest.raises(ResourceError, match=rf"{out} needs 8\.796 TB"):
            check_disk([(out, plan, (), journal)], copied_bytes=2**43)


# -- names that lead nowhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("loop", "cannot be used: Too many levels of symbolic links"),
        ("loop/new", "cannot be used: Too many levels of symbolic links"),
        ("file/new", "cannot be used: Not a directory"),
        ("dangling", "is a link to nowhere, which is not there; make that folder"),
        ("x" * 300, "cannot be used: File name too long"),
        ("a\0b", "cannot be a folder: embedded null byte"),
    ],
    ids=lambda text: text[:9],
)
def test_a_name_that_leads_nowhere_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputError, match=says):
        check_reachable(tmp_path / name)


def test_a_folder_that_is_there_or_could_be_made_is_reachable(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (".", "new", "new/newer", "link", "link/new"):
        check_reachable(tmp_path / name)
