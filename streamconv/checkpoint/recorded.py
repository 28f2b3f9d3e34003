"""Files of a work folder that a later run goes on with, checked against the SHA-256 that was recorded of each.

    hashes    a line `SHA-256  NAME` for each file, as sha256sum writes them; of two with one name the later counts

A line is on the disk before its file has its name. What a file system, a disk or a person has changed since then is
so not taken for what was written: it is made again. A damaged line is as good as none.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from streamconv.checkpoint.writer import write_error
from streamconv.errors import OutputError

DIGESTS = "hashes"
_LINE = re.compile(rb"([0-9a-f]{64})  ([^\n]+)\n")
_CHUNK_BYTES = 4 * 2**20
_MOST_BYTES = 64 * 2**20
_WRITES = os.O_WRONLY | os.O_RDWR

OnChunk = Callable[[], None]
"""Called between two chunks that are hashed; raises to stop."""


class RecordedFiles:
    """Files in `folder`, by name. One that holds several contents in turn may be recorded under a name for each.

    Every method raises ResourceError where the disk is full, and OutputError where a file cannot be read or written, or
    something else is in its place: a link, a folder, a pipe.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / DIGESTS
        self._digests = dict(_read(self._path))

    def record(self, digests: Mapping[str, str]) -> None:
        """Record the SHA-256 of files by name; durable when this returns."""
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in digests.items()).encode()
        descriptor = open_own(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines  # a kill has torn the last one
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            os.fsync(descriptor)
        except OSError as error:
            raise write_error(error, self._path) from error
        finally:
            close_own(descriptor, self._path)
        self._digests |= digests

    def is_whole(self, path: Path, name: str | None = None, on_chunk: OnChunk = lambda: None) -> bool:
        """Whether the file at `path` is there and is the one recorded as `name`, its own where none is given."""
        recorded = self._digests.get(name or path.name)
        return recorded is not None and recorded == hash_file(path, on_chunk)


def hash_file(path: Path, on_chunk: OnChunk = lambda: None) -> str | None:
    """SHA-256 of a file of our own; None where there is none. Raises OutputError where it is something else."""
    if not _exists(path):
        return None
    descriptor = open_own(path, os.O_RDONLY)
    try:
        return hash_descriptor(descriptor, on_chunk)
    except OSError as error:
        raise read_error(error, path) from error
    finally:
        close_own(descriptor, path)


def hash_descriptor(descriptor: int, on_chunk: OnChunk = lambda: None) -> str:
    """SHA-256 of an open file, from its begin. Raises OSError."""
    digest = hashlib.sha256()
    hash_range(digest, descriptor, 0, os.fstat(descriptor).st_size, on_chunk)
    return digest.hexdigest()


def hash_range(
    digest: hashlib._Hash, descriptor: int, start: int, stop: int, on_chunk: OnChunk = lambda: None
) -> None:
    """Add to `digest` the bytes of an open file from `start` to `stop`, as far as they are there. Raises OSError."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, stop - start)))
    while start < stop and (count := os.preadv(descriptor, [buffer[: stop - start]], start)):
        digest.update(buffer[:count])
        start += count
        on_chunk()


def read_own(path: Path) -> bytes | None:
    """Content of a small file of our own; None where there is none. Raises OutputError where it is something else."""
    if not _exists(path):
        return None
    descriptor = open_own(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, min(os.fstat(descriptor).st_size, _MOST_BYTES), 0)
    except OSError as error:
        raise read_error(error, path) from error
    finally:
        close_own(descriptor, path)


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file in a work folder. Raises OutputError where it is a link, a folder or a pipe."""
    # A pipe would wait for its other end; a link may lead to somebody's file, which is neither read nor written to.
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        if _exists(path):
            _check_regular(path, path.lstat().st_mode)
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise (write_error if flags & _WRITES else read_error)(error, path) from error
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def close_own(descriptor: int, path: Path) -> None:
    """Close a file in a work folder: NFS tells only then that the disk was full."""
    try:
        os.close(descriptor)
    except OSError as error:
        raise write_error(error, path) from error


def remove_own(path: Path) -> None:
    """Delete a file in a work folder, if it is there. Raises OutputError where that is not possible."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be deleted: {error.strerror}; remove it yourself and run again"
        ) from error


def read_error(error: OSError, path: Path) -> OutputError:
    return OutputError(
        f"{path} cannot be read: {error.strerror}; check the disk, remove the file and run again"
    )


def _exists(path: Path) -> bool:
    """Whether anything has this name, be it a link to nothing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise read_error(error, path) from error
    return True


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
        raise OutputError(
            f"{path} must be a file that streamconv wrote, found {kind.get(stat.S_IFMT(mode), 'something else')}; "
            "remove it and run again"
        )


def _read(path: Path) -> Mapping[str, str]:
    content = read_own(path) or b""
    lines = (_LINE.fullmatch(line) for line in content.splitlines(keepends=True))
    return {found[2].decode(errors="replace"): found[1].decode() for found in lines if found is not None}
