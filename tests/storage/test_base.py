"""Status of an input's file: what tells that it was written to, and what is told apart from that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.errors import CheckpointError
from streamconv.storage.local import check_unchanged, open_folder


def write(path: Path, content: bytes) -> None:
    """Write with a modification time that is always the same."""
    path.write_bytes(content)
    os.utime(path, (0, 0))


def replace(path: Path, content: bytes) -> None:
    write(path.with_name("other"), content)
    path.with_name("other").chmod(0o600)
    path.with_name("other").replace(path)


@pytest.mark.parametrize(
    ("change", "is_seen"),
    [
        (lambda path: write(path, b"other!!"), True),
        (lambda path: replace(path, b"other!!"), True),
        (lambda path: path.touch(), True),
        (lambda path: write(path, b"longer content"), True),
        (lambda path: path.chmod(0o640), False),
        (lambda path: path.with_name("link").hardlink_to(path), False),
        (lambda path: path.read_bytes(), False),
    ],
    ids=["edited", "replaced", "touched", "longer", "chmod", "hard link", "read"],
)
def test_a_file_that_was_written_to_is_seen_and_a_backup_is_none(
    tmp_path: Path, change: Callable[[Path], object], is_seen: bool
) -> None:
    path = tmp_path / "a"
    write(path, b"content")
    file = open_folder(str(tmp_path)).file("a")
    check_unchanged(file, path.stat())
    change(path)
    if not is_seen:
        check_unchanged(file, path.stat())
        return
    with pytest.raises(CheckpointError, match=r"a (changed|was written to or replaced) while it was in use"):
        check_unchanged(file, path.stat())
