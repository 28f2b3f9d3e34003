"""LocalFolder: which names lead to a file, and what its version says."""

from __future__ import annotations

import errno
import os
import socket
from functools import partial
from pathlib import Path

import pytest

from streamconv.errors import CheckpointError, ResourceError, StreamconvError
from streamconv.storage import storage_kind
from streamconv.storage.base import Origin
from streamconv.storage.local import LocalFolder, list_folder, open_file, open_folder, real_path

BAD_NAMES = [
    "",
    ".",
    "..",
    "../a",
    "a/../b",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/",
    "a\\b",
    "C:a",
    "c:/a",
    "a\0b",
    "a\nb",
]


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.bin").write_bytes(b"12345")
    return open_folder(str(tmp_path / "here"))


def cached_snapshot(cache: Path) -> Path:
    """A model in the Hub's cache: one file in its snapshot, a link to its blob. Returns the snapshot."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "f00d").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    return snapshot


def test_a_plain_file_has_its_size_and_modification_time(folder: LocalFolder) -> None:
    os.utime(folder.path / "a.bin", ns=(1, 1234567890))
    file = folder.file("a.bin")
    assert (file.name, file.size, file.version) == ("a.bin", 5, "mtime:1234567890")
    assert Path(file.path) == folder.path / "a.bin"


def test_names_are_the_entries_that_are_not_folders_sorted(folder: LocalFolder) -> None:
    (folder.path / "sub").mkdir()
    (folder.path / "Z").touch()
    (folder.path / "dead").symlink_to("nowhere")
    assert folder.names() == ("Z", "a.bin", "dead")


def test_a_file_in_a_subfolder_can_be_named(folder: LocalFolder) -> None:
    (folder.path / "sub").mkdir()
    (folder.path / "sub" / "b").write_bytes(b"x")
    assert folder.file("sub/b").size == 1
    assert folder.names("sub") == ("sub/b",)
    assert folder.names("none") == folder.names("a.bin") == ()


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_is_not_plainly_inside_is_refused(folder: LocalFolder, name: str) -> None:
    with pytest.raises(CheckpointError, match="refused"):
        folder.file(name)


def test_links_inside_the_folder_are_followed(folder: LocalFolder) -> None:
    (folder.path / "b").symlink_to("a.bin")
    (folder.path / "c").symlink_to(folder.path / "b")
    assert folder.file("c").path == str(folder.path / "a.bin")


def test_a_link_out_of_the_folder_is_refused(folder: LocalFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    (folder.path / "b").symlink_to("../secret")
    (folder.path / "up").symlink_to("..")
    for name in ("b", "up/secret"):
        with pytest.raises(CheckpointError, match=f"{name} is a link that leads outside"):
            folder.file(name)


def test_a_sibling_whose_name_begins_alike_is_outside(folder: LocalFolder, tmp_path: Path) -> None:
    (tmp_path / "here2").mkdir()
    (tmp_path / "here2" / "x").touch()
    (folder.path / "x").symlink_to("../here2/x")
    with pytest.raises(CheckpointError, match="outside"):
        folder.file("x")


def test_a_cached_file_is_known_by_its_blob(tmp_path: Path) -> None:
    file = open_folder(str(cached_snapshot(tmp_path))).file("model.safetensors")
    assert (file.name, file.version, file.size) == ("model.safetensors", "blob:f00d", 7)


def test_the_version_of_a_cached_file_does_not_depend_on_the_cache(tmp_path: Path) -> None:
    first, second = (open_folder(str(cached_snapshot(tmp_path / at))) for at in ("one", "two"))
    assert first.file("model.safetensors").version == second.file("model.safetensors").version


def test_a_link_to_a_snapshot_is_that_snapshot(tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(cached_snapshot(tmp_path))
    assert open_folder(str(tmp_path / "short")).file("model.safetensors").version == "blob:f00d"


def test_a_subfolder_of_a_snapshot_reaches_its_blobs(tmp_path: Path) -> None:
    sub = cached_snapshot(tmp_path) / "checkpoint-10"
    sub.mkdir()
    (sub / "a").symlink_to("../../../blobs/f00d")
    assert open_folder(str(sub)).file("a").version == "blob:f00d"


def test_a_cached_model_may_not_reach_another_model(tmp_path: Path) -> None:
    snapshot = cached_snapshot(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "beef").touch()
    (snapshot / "x").symlink_to("../../../models--org--other/blobs/beef")
    with pytest.raises(CheckpointError, match="x is a link that leads outside"):
        open_folder(str(snapshot)).file("x")


def test_a_link_to_a_plain_file_of_the_same_cached_model_has_no_blob_to_be_known_by(tmp_path: Path) -> None:
    snapshot = cached_snapshot(tmp_path)
    (snapshot.parent / "4567def").mkdir()
    (snapshot.parent / "4567def" / "a").touch()
    (snapshot / "a").symlink_to("../4567def/a")
    assert open_folder(str(snapshot)).file("a").version.startswith("mtime:")


def test_only_a_snapshot_may_reach_the_blobs(tmp_path: Path) -> None:
    other = cached_snapshot(tmp_path).parent.parent / "refs" / "pr"
    other.mkdir(parents=True)
    (other / "a").symlink_to("../../blobs/f00d")
    with pytest.raises(CheckpointError, match="a is a link that leads outside"):
        open_folder(str(other)).file("a")


def test_a_blob_cut_short_is_not_opened(tmp_path: Path) -> None:
    file = open_folder(str(cached_snapshot(tmp_path))).file("model.safetensors")
    os.truncate(file.path, 3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed .* had 7 bytes, now it has 3"):
        open_file(file)


def test_what_is_missing_is_said(folder: LocalFolder) -> None:
    (folder.path / "dead").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"b\.bin is missing"):
        folder.file("b.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin/x cannot be read|a\.bin/x is missing"):
        folder.file("a.bin/x")
    with pytest.raises(CheckpointError, match="dead is a link to a file that is not there"):
        folder.file("dead")


def test_a_loop_of_links_and_a_name_too_long_are_errors(folder: LocalFolder) -> None:
    (folder.path / "loop").symlink_to("loop")
    for name in ("loop", "x" * 300):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            folder.file(name)


def test_only_regular_files_are_taken(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.path)  # a socket's path is limited to about a hundred characters
    (folder.path / "folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("sock")
    for name, kind in (("folder", "a folder"), ("pipe", "a named pipe"), ("sock", "a socket")):
        with pytest.raises(CheckpointError, match=f"{name} must be a regular file, found {kind}"):
            folder.file(name)
        with pytest.raises(CheckpointError, match=name):
            folder.read_bytes(name, 100)


def test_a_pipe_that_took_the_place_of_a_file_does_not_block(folder: LocalFolder) -> None:
    file = folder.file("a.bin")
    (folder.path / "a.bin").unlink()
    os.mkfifo(folder.path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin must be a regular file, found a named pipe"):
        open_file(file)


def test_read_bytes_stops_at_its_limit(folder: LocalFolder) -> None:
    assert folder.read_bytes("a.bin", 5) == b"12345"
    with pytest.raises(CheckpointError, match=r"a\.bin has 5 bytes, more than the 4"):
        folder.read_bytes("a.bin", 4)


def test_a_file_that_changed_is_not_opened(folder: LocalFolder) -> None:
    file = folder.file("a.bin")
    os.utime(folder.path / "a.bin", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"a\.bin changed"):
        open_file(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_error(folder: LocalFolder) -> None:
    (folder.path / "a.bin").chmod(0)
    with pytest.raises(CheckpointError, match=r"a\.bin cannot be opened: Permission denied"):
        folder.read_bytes("a.bin", 5)


@pytest.mark.parametrize("call", ["open", "fstat", "scandir"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, CheckpointError), (errno.ESTALE, CheckpointError), (errno.EMFILE, ResourceError)],
    ids=["EIO", "ESTALE", "EMFILE"],
)
def test_what_the_system_refuses_is_an_error_that_names_the_file(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[StreamconvError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    ask = folder.names if call == "scandir" else partial(folder.read_bytes, "a.bin", 5)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(kind) as raised:
            ask()
    assert os.strerror(number) in str(raised.value)
    assert kind is ResourceError or ("a.bin" in str(raised.value)) == (call != "scandir")


def test_a_disk_that_gives_no_bytes_is_an_error_that_names_the_file() -> None:
    """The memory of a process is a file whose first bytes nobody can read."""
    folder = LocalFolder("process", Path(f"/proc/{os.getpid()}"))
    with pytest.raises(CheckpointError, match="process: mem cannot be read: Input/output error"):
        folder.read_bytes("mem", 5)
    with pytest.raises(CheckpointError, match="mem cannot be read: Input/output error"):
        folder.read_start(folder.file("mem"), 5)


def test_loops_of_links_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop cannot be opened: Too many levels"):
        open_folder(str(tmp_path / "loop"))
    with pytest.raises(CheckpointError, match="loop cannot be read: Too many levels"):
        LocalFolder("base", tmp_path).file("loop")
    assert storage_kind(str(tmp_path / "loop")) == "folder"
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        assert storage_kind("loop") == "folder"
    assert real_path(tmp_path / "loop") == tmp_path / "loop"
    assert real_path("~nobody-of-this-name/x").name == "x"


def test_a_folder_that_vanished_cannot_be_listed(folder: LocalFolder) -> None:
    (folder.path / "a.bin").unlink()
    folder.path.rmdir()
    with pytest.raises(CheckpointError, match="cannot be listed"):
        folder.names()


def test_a_name_that_is_not_utf8_is_listed_and_opened(folder: LocalFolder) -> None:
    Path(os.fsdecode(os.fsencode(folder.path) + b"/\xff")).touch()
    assert folder.file(folder.names()[-1]).size == 0


def test_a_cached_file_in_the_store_that_all_models_share(tmp_path: Path) -> None:
    """`models--org--name/blobs/<id>` is then a link, to `<cache>/blobs/<2 digits>/<xet hash>`."""
    snapshot = cached_snapshot(tmp_path)
    store = tmp_path / "blobs" / "ab"
    store.mkdir(parents=True)
    (store / "abcd").write_bytes(b"shared")
    (snapshot.parent.parent / "blobs" / "cafe").symlink_to("../../blobs/ab/abcd")
    (snapshot / "x.safetensors").symlink_to("../../blobs/cafe")
    file = open_folder(str(snapshot)).file("x.safetensors")
    assert (file.version, file.size, file.path) == ("blob:cafe", 6, str(store / "abcd"))


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("models--org--model", "org/model"),
        ("models--gpt2", "gpt2"),
        ("models--org--a-b.c--d", "org/a-b.c--d"),
    ],
)
def test_a_snapshot_knows_where_it_is_from(tmp_path: Path, name: str, repo: str) -> None:
    sub = tmp_path / name / "snapshots" / "0123abc" / "sub"
    sub.mkdir(parents=True)
    for folder in (sub, sub.parent):
        assert open_folder(str(folder)).origin == Origin(repo, "0123abc")


def test_a_folder_of_ones_own_is_from_nowhere(tmp_path: Path) -> None:
    (tmp_path / "models--x" / "llama").mkdir(parents=True)
    assert open_folder(str(tmp_path / "models--x" / "llama")).origin is None


def test_a_signal_while_a_folder_is_listed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "a").touch()
    scandir, left = os.scandir, [3]

    def interrupted(folder: Path) -> object:
        left[0] -= 1
        if left[0] > 0:
            raise InterruptedError
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", interrupted)
    assert list_folder(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert open_folder(str(tmp_path)).names() == ("a", "b")
