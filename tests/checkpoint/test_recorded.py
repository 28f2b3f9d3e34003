"""Files of a work folder are taken for whole only if they are those that were recorded."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.checkpoint.own_files import identify
from streamconv.checkpoint.recorded import (
    DIGESTS,
    RecordedFiles,
    open_recorded,
)
from streamconv.checkpoint.writer import close_written, remove_file
from streamconv.errors import OutputError, ResourceError


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256 is not None
    return sha256


def test_what_was_recorded_is_whole_until_a_bit_flips(tmp_path: Path) -> None:
    path = tmp_path / "a"
    RecordedFiles(tmp_path).record({"a": write(path, b"content")})
    assert RecordedFiles(tmp_path).is_whole(path)
    for change in (b"contenu", b"conten", b"contents", b""):
        path.write_bytes(change)
        assert not RecordedFiles(tmp_path).is_whole(path)
    path.unlink()
    assert not RecordedFiles(tmp_path).is_whole(path)
    assert not RecordedFiles(tmp_path).is_whole(tmp_path / "never")


def test_the_later_line_of_a_name_counts(tmp_path: Path) -> None:
    path, recorded = tmp_path / "states", RecordedFiles(tmp_path)
    recorded.record({"states 0": write(path, b"first"), "other": "0" * 64})
    assert recorded.is_whole(path, "states 0")
    recorded.record({"states 0": write(path, b"second")})
    assert RecordedFiles(tmp_path).is_whole(path, "states 0")
    path.write_bytes(b"first")
    assert not RecordedFiles(tmp_path).is_whole(path, "states 0")


def test_lines_that_are_torn_or_damaged_count_as_none(tmp_path: Path) -> None:
    a, b, lines = tmp_path / "a", tmp_path / "b", tmp_path / DIGESTS
    RecordedFiles(tmp_path).record({"a": write(a, b"a"), "b": write(b, b"b")})
    lines.write_bytes(lines.read_bytes()[:-3])
    found = RecordedFiles(tmp_path)
    assert found.is_whole(a)
    assert not found.is_whole(b)
    found.record({"b": write(b, b"b")})
    assert RecordedFiles(tmp_path).is_whole(b)
    content = lines.read_bytes()
    for place in range(0, len(content), 7):
        lines.write_bytes(content[:place] + bytes([content[place] ^ 129]) + content[place + 1 :])
        for path in (a, b):  # a flipped bit makes no other file whole, and none of it an error
            path.write_bytes(b"other")
            assert not RecordedFiles(tmp_path).is_whole(path)


def fill(path: Path, kind: str) -> None:
    makers: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir,
        "a link": lambda: path.symlink_to(path.parent / "elsewhere"),
        "a named pipe": lambda: os.mkfifo(path),
    }
    makers[kind]()


@pytest.mark.parametrize("kind", ["a folder", "a link", "a named pipe"])
def test_only_a_file_is_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    fill(path, kind)
    for read in (
        lambda path: identify(path, lambda _: None),
        lambda path: open_recorded(path, os.O_RDWR | os.O_CREAT),
    ):
        with pytest.raises(
            OutputError, match=rf"a is {kind}, and must be a file that streamconv made itself"
        ):
            read(path)
    assert not (tmp_path / "elsewhere").exists()


def test_errors_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(code: int) -> Callable[..., int]:
        def fail(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        return fail

    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder cannot be deleted: .*; remove it yourself"):
        remove_file(tmp_path / "folder")
    path = tmp_path / "a"
    write(path, b"content")
    cases: tuple[tuple[str, int, Callable[[], object], type[Exception]], ...] = (
        ("open", errno.EIO, lambda: identify(path, lambda _: None), OutputError),
        ("write", errno.ENOSPC, lambda: RecordedFiles(tmp_path).record({"a": "0" * 64}), ResourceError),
        ("fsync", errno.EIO, lambda: RecordedFiles(tmp_path).record({"a": "0" * 64}), OutputError),
        ("close", errno.EDQUOT, lambda: close_written(-1, path), ResourceError),
    )
    for name, code, use, error in cases:
        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing(code))
            with pytest.raises(error):
                use()
