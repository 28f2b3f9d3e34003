"""Files of a run's own: what is taken for one, and how it is known again."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamconv.checkpoint.own_files import (
    check_kind,
    identify,
    kind_at,
    known_again,
    open_own,
    read_own,
    size_of,
)
from streamconv.errors import OutputError
from streamconv.storage.local import FILE, FOLDER, LINK


def link(path: Path) -> None:
    path.with_name("precious").write_bytes(b"precious")
    path.symlink_to("precious")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def served(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # its name may not be long
        server.bind(path.name)


ODD: dict[str, Callable[[Path], None]] = {
    "a link": link,
    "a link to itself": loop,
    "a named pipe": pipe,
    "a socket": served,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", ODD)
def test_nothing_odd_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd"
    ODD[kind](path)
    says = kind.removesuffix(" to itself")
    assert kind_at(path) == says
    assert size_of(path) is None
    uses: tuple[Callable[[], object], ...] = (
        lambda: open_own(path, os.O_RDWR | os.O_CREAT),
        lambda: read_own(path, 100),
        lambda: identify(path, lambda _: None),
        lambda: check_kind(path, FILE),
    )
    for use in uses:
        with pytest.raises(OutputError, match=f"{path} is {says}, and must be a file that streamconv made"):
            use()
    if kind == "a link":
        assert (tmp_path / "precious").read_bytes() == b"precious"


def test_what_is_not_there_has_no_kind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file" / "none"):
        assert kind_at(path) is None
        assert size_of(path) is None
        check_kind(path, FILE)
    assert read_own(tmp_path / "none", 9) is None
    assert identify(tmp_path / "none", lambda _: None) is None
    assert (kind_at(tmp_path), kind_at(tmp_path / "file")) == (FOLDER, FILE)
    (tmp_path / "link").symlink_to("none")
    assert kind_at(tmp_path / "link") == LINK


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_own(tmp_path / "file", 5) == b"12345"
    assert read_own(tmp_path / "file", 4) is None
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**43)
    assert read_own(tmp_path / "hole", 2**20) is None


def test_a_file_is_known_again_by_where_it_is_or_by_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    read: list[int] = []
    path.write_bytes(b"content")
    known = identify(path, read.append)
    assert known is not None
    assert read == [7]
    assert known.sha256 == hashlib.sha256(b"content").hexdigest()
    path.rename(tmp_path / "final")
    assert known_again(tmp_path / "final", known) == known
    assert known_again(path, known) is None
    (tmp_path / "copy").write_bytes(b"content")
    found = known_again(tmp_path / "copy", known)
    assert found is not None
    assert found != known, "another file, of the same content"
    assert known_again(tmp_path / "final", replace(known, inode=known.inode + 1)) == known


@pytest.mark.parametrize("content", [b"contenT", b"conten", b"content."])
def test_a_file_that_was_changed_is_not_known_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    known = identify(path, lambda _: None)
    assert known is not None
    path.write_bytes(content)
    os.utime(path, ns=(1, known.modified_ns + 1))
    assert known_again(path, known) is None
    path.unlink()
    path.symlink_to("elsewhere")
    assert known_again(path, known) is None


@pytest.mark.parametrize("call", ["lstat", "open", "fstat"])
def test_an_error_of_the_disk_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    known = identify(path, lambda _: None)
    assert known is not None

    def fail(*given: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    uses: dict[str, tuple[Callable[[], object], ...]] = {
        "lstat": (lambda: kind_at(path), lambda: size_of(path), lambda: known_again(path, known)),
        "open": (lambda: read_own(path, 9), lambda: identify(path, lambda _: None)),
        "fstat": (lambda: read_own(path, 9), lambda: identify(path, lambda _: None)),
    }
    before = len(os.listdir("/proc/self/fd"))
    for use in uses[call]:
        with monkeypatch.context() as patches:
            patches.setattr(Path if call == "lstat" else os, call, fail)
            with pytest.raises(OutputError, match=f"{path} cannot be read: Input/output error"):
                use()
    assert len(os.listdir("/proc/self/fd")) == before
