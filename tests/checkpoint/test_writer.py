"""ShardWriter and its like: the bytes, the checksum, resuming, durability, and errors of the disk."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from streamconv import disk
from streamconv.checkpoint import writer as writer_module
from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.types import TensorSpec
from streamconv.checkpoint.writer import ShardWriter, fsync_folder, publish, write_file
from streamconv.dtypes import BF16, F32
from streamconv.errors import OutputError, ResourceError, VerificationError
from tests.checkpoint.no_reservation import without_reservation

HEADER = b"header: "
BODY = bytes(range(256)) * 4
SIZE = len(HEADER) + len(BODY)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors.partial"


def interrupted(path: Path, done: int, more: bytes = b"") -> str:
    """Leave a file as a crash would: synced after `done` bytes of the body, `more` written. The digest at `done`."""
    path.unlink(missing_ok=True)
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY[:done])
        digest = writer.sync()
        writer.write(more)
    return digest


def test_a_file_is_header_and_writes_in_order(path: Path) -> None:
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        assert writer.offset == len(HEADER)
        writer.write(BODY[:100])
        assert writer.sync() == sha256(HEADER + BODY[:100])
        writer.write(memoryview(BODY)[100:])
        assert writer.offset == SIZE
        assert writer.finish() == sha256(HEADER + BODY)
    assert path.read_bytes() == HEADER + BODY


def test_tensors_written_are_read_by_the_official_library(path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).to(torch.bfloat16), "a": torch.randn(4), "none": torch.zeros(0, 3)}
    specs = [TensorSpec(name, BF16 if name == "b" else F32, tuple(t.shape)) for name, t in tensors.items()]
    header = build_header(specs, {"format": "pt"})
    with ShardWriter.create(path, header, len(header) + sum(spec.nbytes for spec in specs)) as writer:
        for tensor in tensors.values():
            writer.write(tensor_bytes(tensor))
        writer.finish()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_umask_decides_who_may_read(path: Path) -> None:
    before = os.umask(0o027)
    try:
        ShardWriter.create(path, HEADER, SIZE).close()
        write_file(path.with_name("config.json"), b"{}")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.with_name("config.json").stat().st_mode & 0o777 == 0o640


def test_an_existing_file_is_never_written_over(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=f"{path} exists already"):
        ShardWriter.create(path, HEADER, SIZE)
    assert path.read_bytes() == b"precious"


def test_the_space_is_taken_before_anything_is_written(path: Path) -> None:
    ShardWriter.create(path, HEADER, 3_000_000).close()
    assert path.stat().st_size == 3_000_000
    assert path.stat().st_blocks * 512 >= 3_000_000


def test_more_than_planned_is_refused_and_not_written(path: Path) -> None:
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY)
        with pytest.raises(
            VerificationError, match=f"{path}: {SIZE + 1} bytes for a file planned with {SIZE}"
        ):
            writer.write(b"x")
        assert writer.finish() == sha256(HEADER + BODY)


def test_less_than_planned_is_not_finished(path: Path) -> None:
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY[:-1])
        with pytest.raises(VerificationError, match=f"{SIZE} bytes were planned, {SIZE - 1} were written"):
            writer.finish()


def test_a_file_cut_short_by_another_is_not_finished(path: Path) -> None:
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY)
        os.truncate(path, SIZE - 5)
        with pytest.raises(VerificationError, match=f"{SIZE - 5} are there"):
            writer.finish()


def test_a_closed_writer_is_done_with(path: Path) -> None:
    writer = ShardWriter.create(path, HEADER, SIZE)
    writer.close()
    writer.close()
    for use in (writer.sync, writer.finish, lambda: writer.write(b"x")):
        with pytest.raises(ValueError, match="is closed"):
            use()


@settings(deadline=None)  # it waits for the disk
@given(st.lists(st.integers(1, 300), max_size=6), st.integers(0, 6), st.binary(max_size=40))
def test_interrupted_anywhere_and_resumed_the_bytes_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, pieces: Sequence[int], kept: int, lost: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "resumed"
    done = min(sum(pieces[:kept]), len(BODY))
    digest = interrupted(path, done, lost[: len(BODY) - done])
    writer = ShardWriter.resume(path, HEADER, SIZE, len(HEADER) + done, digest)
    assert writer is not None
    assert writer.offset == len(HEADER) + done
    with writer:
        for piece in pieces[kept:]:
            writer.write(BODY[done : done + piece])
            done = min(done + piece, len(BODY))
        writer.write(BODY[done:])
        assert writer.finish() == sha256(HEADER + BODY)
    assert path.read_bytes() == HEADER + BODY


def test_what_is_not_the_file_that_was_synced_is_not_resumed(path: Path) -> None:
    offset = len(HEADER) + 500
    digest = interrupted(path, 500)
    good = path.read_bytes()

    def resume(
        content: bytes | None, header: bytes = HEADER, at: int = offset, with_digest: str = digest
    ) -> object:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        writer = ShardWriter.resume(path, header, SIZE, at, with_digest)
        if writer is not None:
            writer.close()
        return writer

    assert resume(good) is not None
    assert resume(good[:offset]) is not None  # a file system that cannot reserve leaves it so
    assert resume(None) is None
    assert resume(b"") is None
    assert resume(good[: offset - 1]) is None
    assert resume(good[:300] + bytes([good[300] ^ 1]) + good[301:]) is None
    assert resume(good, header=b"another ") is None
    assert resume(good, at=offset + 1) is None
    assert resume(good, at=4, with_digest=sha256(HEADER[:4])) is None
    assert resume(good, at=0, with_digest=sha256(b"")) is None
    assert resume(good, with_digest="0" * 64) is None
    assert (
        resume(good + bytes(SIZE), at=SIZE + 9, with_digest=sha256((good + bytes(SIZE))[: SIZE + 9])) is None
    )


def test_a_file_that_grew_too_long_is_cut_on_resuming(path: Path) -> None:
    digest = interrupted(path, 500)
    path.write_bytes(path.read_bytes() + b"more")
    writer = ShardWriter.resume(path, HEADER, SIZE, len(HEADER) + 500, digest)
    assert writer is not None
    writer.write(BODY[500:])
    assert writer.finish() == sha256(HEADER + BODY)
    assert path.read_bytes() == HEADER + BODY


def test_resuming_reads_more_than_one_buffer(path: Path) -> None:
    content = os.urandom(9 << 20)
    with ShardWriter.create(path, HEADER, len(HEADER) + len(content) + 1) as writer:
        writer.write(content)
        digest = writer.sync()
    resumed = ShardWriter.resume(
        path, HEADER, len(HEADER) + len(content) + 1, len(HEADER) + len(content), digest
    )
    assert resumed is not None
    assert resumed.sync() == digest == sha256(HEADER + content)
    resumed.close()


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    digest = interrupted(tmp_path / "elsewhere", 500)
    path.symlink_to("elsewhere")
    with pytest.raises(OutputError, match=str(path)):
        ShardWriter.resume(path, HEADER, SIZE, len(HEADER) + 500, digest)


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def test_writing_goes_on_after_a_part(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: whole(fd, view[:7], offset))
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY)
        assert writer.finish() == sha256(HEADER + BODY)
    assert path.read_bytes() == HEADER + BODY


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (
            errno.ENOSPC,
            ResourceError,
            r"the disk is full \(\d+ bytes are free\) with 924 bytes still to be written",
        ),
        (errno.EDQUOT, ResourceError, "the disk quota is used up with 924 bytes"),
        (errno.EFBIG, ResourceError, "may not grow so large"),
        (errno.EIO, OutputError, "cannot be written: Input/output error"),
        (errno.EROFS, OutputError, "cannot be written: Read-only file system"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_an_error_of_the_disk_is_ours_and_names_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], says: str
) -> None:
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY[:100])
        monkeypatch.setattr(os, "pwrite", failing(code))
        with pytest.raises(error, match=f"{path}.*{says}"):
            writer.write(BODY[100:])
        assert writer.offset == len(HEADER) + 100
        monkeypatch.undo()
        assert writer.sync() == sha256(HEADER + BODY[:100])


def test_after_a_failed_sync_everything_fails_in_the_same_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may be writing meanwhile: it must neither go on nor meet a descriptor that is another file's."""
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(OutputError, match=f"{path} cannot be written: Input/output error"):
            writer.sync()
        monkeypatch.undo()
        for use in (writer.sync, writer.finish, lambda: writer.write(b"x")):
            with pytest.raises(OutputError, match=f"{path} cannot be written: Input/output error"):
                use()


def test_a_failed_last_sync_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY)
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(ResourceError, match=f"{path}: the disk is full"):
            writer.finish()


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_file_sizes_shows_before_anything_is_written(path: Path) -> None:
    with file_size_limit(1 << 20):
        with pytest.raises(ResourceError, match=f"{path}: a file may not grow so large.*ulimit -f"):
            ShardWriter.create(path, HEADER, 2 << 20)
        assert not path.exists()


def test_a_limit_on_file_sizes_met_while_writing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", without_reservation)
    with (
        file_size_limit(1 << 20),
        ShardWriter.create(path, HEADER, 2 << 20) as writer,
        pytest.raises(ResourceError, match=f"{path}: a file may not grow so large"),
    ):
        writer.write(bytes((2 << 20) - len(HEADER)))


def test_where_space_cannot_be_reserved_the_free_space_is_compared(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", without_reservation)
    monkeypatch.setattr(writer_module, "free_bytes", lambda _: SIZE - 1)
    with pytest.raises(
        ResourceError, match=rf"{path}: the disk is full \({SIZE - 1} bytes are free\) with {SIZE}"
    ):
        ShardWriter.create(path, HEADER, SIZE)
    assert not path.exists()
    monkeypatch.setattr(writer_module, "free_bytes", lambda _: SIZE)
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY)
        assert writer.finish() == sha256(HEADER + BODY)


def test_a_file_system_that_does_not_tell_its_free_space_is_tried(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", without_reservation)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, *[0] * 8)))  # as ramfs says
    with ShardWriter.create(path, HEADER, SIZE) as writer:
        writer.write(BODY)
        assert writer.finish() == sha256(HEADER + BODY)


def test_every_byte_behind_the_cursor_is_written_back_and_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[tuple[int, int]] = []
    monkeypatch.setattr(writer_module, "WINDOW_BYTES", 8192)
    monkeypatch.setattr(disk, "advise", lambda _, start, length, advice: windows.append((start, length)))
    content = os.urandom(50_000)
    with ShardWriter.create(path, HEADER, len(HEADER) + len(content)) as writer:
        for start in range(0, len(content), 1000):
            writer.write(content[start : start + 1000])
        writer.finish()
    covered = [page for start, length in windows for page in range(start // 4096, (start + length) // 4096)]
    assert sorted(set(covered)) == list(range(12))
    assert all(covered.count(page) == 2 for page in range(10))  # once to write out, once to drop
    assert path.read_bytes() == HEADER + content


def test_publishing_replaces_and_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: the file's bytes, its name, the folder that holds the name."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def watch_replace(source: Path, target: Path) -> None:
        steps.append(f"rename {source.name} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    target = tmp_path / "config.json"
    target.write_bytes(b"old and longer")
    write_file(target, b"new")
    assert target.read_bytes() == b"new"
    assert steps == [
        "sync .config.json.partial",
        "rename .config.json.partial config.json",
        f"sync {tmp_path.name}",
    ]
    assert os.listdir(tmp_path) == ["config.json"]


def test_write_file_takes_the_place_of_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_bytes(b"half")
    write_file(tmp_path / "a", b"")
    assert (tmp_path / "a").read_bytes() == b""
    assert os.listdir(tmp_path) == ["a"]


def test_where_nothing_can_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    (tmp_path / ".b.partial").mkdir()
    with pytest.raises(OutputError, match=r"gone/\.a\.partial cannot be written: No such file or directory"):
        write_file(tmp_path / "gone" / "a", b"x")
    with pytest.raises(OutputError, match=r"file/\.?a(\.partial)? cannot be written: Not a directory"):
        write_file(tmp_path / "file" / "a", b"x")
    with pytest.raises(OutputError, match=r"\.b\.partial cannot be deleted: Is a directory; remove it"):
        write_file(tmp_path / "b", b"x")
    with pytest.raises(OutputError, match="folder cannot be written"):
        publish(tmp_path / "file", tmp_path / "folder")
    with pytest.raises(OutputError, match="x cannot be written"):
        publish(tmp_path / "gone", tmp_path / "x")
    with pytest.raises(OutputError, match="gone cannot be written"):
        fsync_folder(tmp_path / "gone")


def test_a_file_system_that_cannot_sync_folders_is_put_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    fsync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OutputError, match=str(tmp_path)):
        fsync_folder(tmp_path)


# -- the last call, and what the disk says of itself ---------------------------------------------------------------


def closing_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """NFS tells of writes that came to nothing when the file is closed."""
    close = os.close

    def fail(descriptor: int) -> None:
        close(descriptor)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "close", fail)


@pytest.mark.parametrize(("code", "error"), [(errno.EIO, OutputError), (errno.EDQUOT, ResourceError)])
def test_an_error_on_closing_is_not_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    writer = ShardWriter.create(path, HEADER, SIZE)
    writer.write(BODY)
    closing_fails(monkeypatch, code)
    with pytest.raises(error, match=str(path)):
        writer.finish()
    with pytest.raises(ValueError, match="not finished"):
        _ = writer.identity
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_on_closing_does_not_hide_what_came_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        with monkeypatch.context() as patches, ShardWriter.create(path, HEADER, SIZE):
            closing_fails(patches, errno.EIO)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_a_disk_without_inodes_is_not_called_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    monkeypatch.setattr(
        os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9999, 9999, 9999, 500, 0, 0, 0, 255))
    )
    with pytest.raises(ResourceError, match=r"the disk takes no more files.*no inodes are left") as caught:
        ShardWriter.create(path, HEADER, SIZE)
    assert "full" not in str(caught.value)


def test_a_disk_that_is_full_beside_free_space_is_told_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(ResourceError, match="such as a quota or a reserve and run again") as caught:
        ShardWriter.create(path, HEADER, SIZE)
    assert "at least that much" not in str(caught.value)


def test_a_disk_that_cannot_be_asked_for_its_space_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", failing(errno.EIO))
    with pytest.raises(OutputError, match="cannot be asked for its free space: Input/output error"):
        ShardWriter.create(path, HEADER, SIZE)
    assert not path.exists()
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(ResourceError, match="the disk is full;"):
        ShardWriter.create(path, HEADER, SIZE)


@pytest.mark.parametrize("call", ["fstat", "ftruncate"])
def test_going_on_with_a_file_that_cannot_be_fitted_is_an_error_of_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path.write_bytes(HEADER + BODY + b"more")
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patches:
        patches.setattr(os, call, failing(errno.EIO))
        with pytest.raises(OutputError, match="Input/output error"):
            ShardWriter.resume(path, HEADER, SIZE, len(HEADER), sha256(HEADER))
    assert len(os.listdir("/proc/self/fd")) == before


# -- past the page cache -------------------------------------------------------------------------------------------

LONG = bytes(os.urandom(3 << 20))


def descriptors(path: Path) -> list[int]:
    """Flags of this process's descriptors of a file."""
    found = [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]
    return [
        int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:\t")[1].split()[0], 8) for fd in found
    ]


@pytest.mark.parametrize("at", [4096, 5000, (1 << 20) + 8, 3 << 20], ids=str)
def test_synced_anywhere_killed_and_resumed_directly_the_bytes_are_the_same(path: Path, at: int) -> None:
    """What was synced is on the disk, though its last block is no whole one; what came after is not believed."""
    size = 4096 + len(LONG)
    header = bytes(4096)
    content = header + LONG
    with ShardWriter.create(path, header, size, direct=True) as writer:
        assert sorted(flags & os.O_DIRECT > 0 for flags in descriptors(path)) == [False, True]
        writer.write(LONG[: at - 4096])
        mark = writer.mark()
        writer.write(LONG[at - 4096 : at])
        assert writer.sync(mark) == sha256(content[:at])
        assert path.read_bytes()[:at] == content[:at]
    assert not descriptors(path)
    resumed = ShardWriter.resume(path, header, size, at, sha256(content[:at]), direct=True)
    assert resumed is not None
    with resumed:
        assert len(descriptors(path)) == 2
        resumed.write(LONG[at - 4096 :])
        assert resumed.finish() == sha256(content)
    assert path.read_bytes() == content
    assert not descriptors(path)


def test_where_files_cannot_be_opened_for_it_they_are_written_as_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refusing(name: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    with ShardWriter.create(path, HEADER, SIZE, direct=True) as writer:
        assert len(descriptors(path)) == 1
        writer.write(BODY)
        assert writer.finish() == sha256(HEADER + BODY)
    assert path.read_bytes() == HEADER + BODY


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, ResourceError), (errno.EIO, OutputError)])
def test_an_error_of_direct_writing_is_ours_and_lasts(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    with ShardWriter.create(path, HEADER, len(HEADER) + len(LONG), direct=True) as writer:
        writer.write(LONG[:1000])
        mark = writer.mark()
        monkeypatch.setattr(os, "pwrite", failing(code))
        with pytest.raises(error, match=str(path)):
            writer.write(LONG[1000:])
        monkeypatch.undo()
        with pytest.raises(error, match=str(path)):
            writer.mark()
        assert writer.sync(mark) == sha256(HEADER + LONG[:1000])  # from the thread that syncs


def test_an_error_when_the_second_descriptor_is_closed_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter.create(path, HEADER, SIZE, direct=True)
    closed, close = [], os.close

    def closing(descriptor: int) -> None:
        close(descriptor)
        closed.append(descriptor)
        if len(closed) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", closing)
    with pytest.raises(OutputError, match=str(path)):
        writer.close()
    assert len(closed) == 2
