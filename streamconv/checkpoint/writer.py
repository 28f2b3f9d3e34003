"""Writes one file front to back with a rolling SHA-256, its disk space taken first; makes renames durable.

A file is written under a name of its own, synced, then renamed by `publish`, so that nothing under a final
name is ever incomplete. What a crash leaves is a prefix that `ShardWriter.resume` checks and continues.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from streamconv import disk
from streamconv.checkpoint.blocks import BlockWriter
from streamconv.checkpoint.own_files import FileIdentity, identity_of, open_own
from streamconv.checkpoint.reader import flat_bytes
from streamconv.errors import OutputError, ResourceError, StreamconvError, VerificationError
from streamconv.storage.base import SourceFile
from streamconv.storage.hashing import hash_range
from streamconv.storage.local import close_quietly, open_file
from streamconv.system_errors import lacking
from streamconv.threads import Future, Pool

# Left alone, the kernel lets dirty pages pile up until a sync has to wait for them all: 1 GiB with a sync
# every 256 MiB took 2.1 to 3.2 s so, and 1.3 to 1.9 s with write-back every 32 MiB (ext4 on a cloud disk).
WINDOW_BYTES = 32 << 20
"""Bytes that are written back at once, a whole number of pages."""

_WINDOWS = 4
_PAGE = 4096
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file: all before `offset` has been written, and `sha256` will be known once it is hashed."""

    offset: int
    sha256: Future[str]


class ShardWriter:
    """An open output file of planned size, written strictly in order. One writer belongs to one thread.

    Hashing takes longer than copying into the page cache, and asking for write-back may wait for the disk: both trail
    behind in threads of their own. `sync` and `finish` alone may be called from another thread, while writing goes on.

    Every method raises ResourceError when the disk is full, OutputError when it cannot be written to, and
    VerificationError when more or less is written than was planned.
    """

    def __init__(self, path: Path, descriptor: int, size: int, offset: int, sha256: hashlib._Hash) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self._size = size
        self._offset = offset
        self._sha256 = sha256
        self._window = offset
        self._is_clone = False
        self._blocks: BlockWriter | None = None  # where bytes go directly to the disk
        self._identity: FileIdentity | None = None
        self._failure: StreamconvError | None = None
        self._trail = Pool(1, "sha256")  # starts no thread before it is used
        self._flusher = Pool(1, "flush")
        self._flushing: deque[Future[None]] = deque()

    @classmethod
    def create(
        cls, path: Path, header: Bytes, size: int, same_as: SourceFile | None = None, direct: bool = False
    ) -> Self:
        """A new file, readable as the umask allows, with `size` bytes reserved and `header` written.

        With `direct`, what is written passes by the page cache, where the file system lets it: for large files.

        Where `same_as` is given, all that will be written is known to be that file's content: the new one then
        shares its blocks if the file system can do so, and what is written is only hashed.

        A file that exists is an OutputError. Where not all of the space can be had, no file stays.
        """
        descriptor = _open_new(path)
        try:
            is_clone = same_as is not None and _clone(same_as, descriptor)
            if not is_clone:
                _reserve(descriptor, path, size)
            writer = cls(path, descriptor, size, 0, hashlib.sha256())
            writer._is_clone = is_clone
            writer.write(header)
            if direct and not is_clone:
                writer._go_direct()
        except BaseException:
            close_quietly(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return writer

    @classmethod
    def resume(
        cls, path: Path, header: Bytes, size: int, offset: int, sha256: str, direct: bool = False
    ) -> Self | None:
        """The file as it was when `sync` returned `sha256` at `offset`, ready to go on from there.

        None if it is not: missing, shorter, with another header or other bytes. Such a file is of no use.
        """
        try:
            descriptor = open_own(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise write_error(error, path) from error
        with contextlib.ExitStack() as failing:
            failing.callback(close_quietly, descriptor)
            digest = _rehash(descriptor, path, header, offset) if offset <= size else None
            if digest is None or digest.hexdigest() != sha256:
                return None
            _fit(descriptor, path, size)
            writer = cls(path, descriptor, size, offset, digest)
            if direct:
                writer._go_direct()
            failing.pop_all()
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*(() if kind is None else (StreamconvError,))):  # what came first is told
            self.close()

    @property
    def offset(self) -> int:
        """Bytes written so far, the header included."""
        return self._offset

    @property
    def identity(self) -> FileIdentity:
        """The file that `finish` has finished, to be known again under whatever name."""
        if self._identity is None:
            raise ValueError(f"{self._path} is not finished")
        return self._identity

    def write(self, buffer: Bytes, release: Callable[[], None] | None = None) -> None:
        """Append all bytes of `buffer`. After an error nothing of it counts as written.

        With `release`, hashing may go on when this returns: `buffer` must stay as it is until `release` is called,
        from another thread.
        """
        view = flat_bytes(memoryview(buffer))
        if self._offset + len(view) > self._size:
            raise VerificationError(
                f"{self._path}: {self._offset + len(view)} bytes for a file planned with {self._size}"
            )
        self._put(view)
        self._offset += len(view)
        hashing = self._trail.submit(self._hash, view, self._offset, release)
        if release is None:
            hashing.result()

    def _hash(self, view: memoryview, end: int, release: Callable[[], None] | None) -> None:
        """Take in, in the trailing thread, what was written up to `end`, and let the kernel write it out."""
        self._sha256.update(view)
        if release is not None:
            release()
        self._write_back(end)

    def _go_direct(self) -> None:
        """Have all that follows written directly, if the file can be opened for that."""
        descriptor = self._open()
        direct = disk.open_direct(self._path, descriptor, os.O_WRONLY)
        if direct is None:
            return
        try:
            self._blocks = BlockWriter(descriptor, direct, self._offset)
        except OSError as error:
            close_quietly(direct)
            raise write_error(error, self._path) from error

    def _put(self, view: memoryview) -> None:
        """Have the system take `view`, or what can be written of it by now."""
        descriptor, done = self._open(), 0
        try:
            if self._blocks is not None:
                self._blocks.append(view)
            elif not self._is_clone:
                while done < len(view):
                    done += os.pwrite(descriptor, view[done:], self._offset + done)
        except OSError as error:
            raise write_error(error, self._path, self._size - self._offset - done) from error

    def mark(self) -> Mark:
        """Mark the file's present end, for a `sync` that need not wait for what will be written after."""
        self._open()
        if self._blocks is not None:
            try:
                self._blocks.flush()
            except OSError as error:
                raise write_error(error, self._path, self._size - self._offset) from error
        return Mark(self._offset, self._trail.submit(self._sha256.hexdigest))

    def sync(self, mark: Mark | None = None) -> str:
        """Bring all written so far, or up to `mark`, to the disk; return its SHA-256.

        After a failed sync, everything that is tried fails in the same way: the kernel may have dropped the pages, and
        the next sync would succeed without them. The file stays open, as another thread may be writing to it.
        """
        digest = (mark or self.mark()).sha256.result()
        try:
            disk.sync_data(self._open())
        except OSError as error:
            self._failure = write_error(error, self._path)
            raise self._failure from error
        return digest

    def finish(self) -> str:
        """Check that the file is complete, bring it to the disk and close it; return its SHA-256."""
        digest = self.mark().sha256.result()
        with self:
            try:
                os.fsync(self._open())
                found = os.fstat(self._open())
            except OSError as error:
                raise write_error(error, self._path) from error
        if not self._offset == found.st_size == self._size:
            raise VerificationError(
                f"{self._path}: {self._size} bytes were planned, {self._offset} were written,"
                f" {found.st_size} are there"
            )
        self._identity = identity_of(found, digest)
        return digest

    def close(self) -> None:
        """Close the file as it is: `resume` can continue it from the last `sync`."""
        self._trail.shutdown()
        self._flusher.shutdown()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            if self._blocks is not None:
                self._blocks.close()
        except OSError as error:
            close_quietly(descriptor)
            raise write_error(error, self._path) from error
        close_written(descriptor, self._path)

    def _open(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"{self._path} is closed")
        if self._failure is not None:
            raise self._failure
        return self._descriptor

    def _write_back(self, end: int) -> None:
        """Start writing out the window behind `end`, and drop the window before it from memory.

        DONTNEED does either: it starts write-back of dirty pages and drops clean ones (Linux mm/fadvise.c).
        sync_file_range, with or without waiting, measured no better and is not in Python's `os`.
        """
        end -= end % _PAGE
        if end - self._window >= WINDOW_BYTES:
            start = max(0, self._window - WINDOW_BYTES)
            self._flushing.append(
                self._flusher.submit(disk.advise, self._open(), start, end - start, "DONTNEED")
            )
            self._window = end
        if len(self._flushing) > _WINDOWS:
            self._flushing.popleft().result()  # the disk is slower: what waits for it must not fill the memory


def publish(source: Path, target: Path) -> None:
    """Give a finished file its final name, replacing what has it; durable when this returns."""
    try:
        source.replace(target)
    except OSError as error:
        raise write_error(error, target) from error
    fsync_folder(target.parent)


def write_file(path: Path, content: Bytes) -> None:
    """Write a small file whole or not at all: under a temporary name beside it, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.partial")
    remove_file(temporary)  # of a run that was killed
    write_anew(temporary, content)
    publish(temporary, path)


def write_anew(path: Path, content: Bytes) -> FileIdentity:
    """Write a small file under a name where a run that was killed may have left one; durable when this returns."""
    remove_file(path)
    with ShardWriter.create(path, content, memoryview(content).nbytes) as writer:
        writer.finish()
    return writer.identity


def remove_file(path: Path) -> None:
    """Remove a file that may not be there. Raises OutputError where that is not possible."""
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a folder of that name, say
        raise lacking(error) or OutputError(
            f"{path} cannot be deleted: {error.strerror}; remove it yourself, or make the place writable, and run the"
            " same command again"
        ) from error


def close_written(descriptor: int, path: Path) -> None:
    """Close a file that was written to: NFS may tell only now that something did not reach the disk."""
    try:
        os.close(descriptor)
    except OSError as error:
        raise write_error(error, path) from error


def fsync_folder(path: Path) -> None:
    """Make what was created or renamed in this folder survive a power cut, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in disk.NOT_SUPPORTED:  # CIFS and some FUSE file systems cannot
            raise write_error(error, path) from error


def _fit(descriptor: int, path: Path, size: int) -> None:
    """Make the file no longer than `size`, and take its space."""
    try:
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
    except OSError as error:
        raise write_error(error, path) from error
    _reserve(descriptor, path, size)


def _open_new(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise OutputError(f"{path} exists already; another run may be writing it") from error
    except OSError as error:
        raise write_error(error, path) from error


def _clone(source: SourceFile, descriptor: int) -> bool:
    """Whether the empty file `descriptor` could be made to share all blocks of `source`."""
    original = open_file(source)
    try:
        return disk.share_blocks(original, descriptor)
    finally:
        close_quietly(original)


def _reserve(descriptor: int, path: Path, size: int) -> None:
    """Take the disk space of the whole file now, so that a full disk shows before the work is done.

    fallocate(2) itself: os.posix_fallocate is glibc's, which writes to every block where the file system
    cannot reserve (NFSv3, many FUSE ones), twice the traffic. There, the free space is compared instead.
    """
    try:
        missing_bytes = size - os.fstat(descriptor).st_blocks * 512
    except OSError as error:
        raise write_error(error, path) from error
    free = free_bytes(path)
    code = disk.allocate(descriptor, size) if size else 0
    if code in disk.NOT_SUPPORTED:
        code = errno.ENOSPC if missing_bytes > free else 0
    if code in _NO_SPACE:
        raise _no_space(path, missing_bytes, free, code)
    if code:
        raise write_error(OSError(code, os.strerror(code)), path)


def _rehash(descriptor: int, path: Path, header: Bytes, offset: int) -> hashlib._Hash | None:
    """SHA-256 of the first `offset` bytes; None if there are fewer, or they do not begin with `header`."""
    digest = hashlib.sha256()
    try:
        if offset < len(header) or os.pread(descriptor, len(header), 0) != header:
            return None
        return digest if hash_range(digest, descriptor, 0, offset) == offset else None
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error: OSError, path: Path, missing_bytes: int = 0) -> StreamconvError:
    """The error of ours for one of the system's; `missing_bytes` are still to be written."""
    if error.errno in _NO_SPACE:
        return _no_space(path, missing_bytes, _free_if_told(path), error.errno)
    if error.errno == errno.EFBIG:
        return ResourceError(
            f"{path}: a file may not grow so large here; ask for smaller shards (--max-shard-size), raise the"
            " limit (ulimit -f), or write to another file system"
        )
    return lacking(error) or OutputError(f"{path} cannot be written: {error.strerror}")


def _no_space(path: Path, missing_bytes: int, free: int | None, code: int) -> ResourceError:
    what, remedy = "the disk is full", "free at least that much"
    if code == errno.EDQUOT:
        what = "the disk quota is used up"
    elif _has_no_inodes(path):
        what = "the disk takes no more files, however much space is free (no inodes are left)"
        remedy = "delete some files there"
    elif free is not None:
        what = f"the disk is full ({free} bytes are free)"
        if free > missing_bytes:
            remedy = "free some more, or raise what keeps these from being used, such as a quota or a reserve"
    need = f" with {missing_bytes} bytes still to be written" if missing_bytes else ""
    return ResourceError(f"{path}: {what}{need}; {remedy} and run again, it resumes")


def _has_no_inodes(path: Path) -> bool:
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return False
    return bool(found.f_files) and not found.f_favail


def _free_if_told(path: Path) -> int | None:
    try:
        return free_bytes(path)
    except OutputError:
        return None


def free_bytes(path: Path) -> int:
    """Free space where `path` lies; without limit if the file system does not say (ramfs, some FUSE ones).

    Raises OutputError where it cannot be asked.
    """
    try:
        found = os.statvfs(path.parent)
    except OSError as error:
        raise lacking(error) or OutputError(
            f"{path.parent} cannot be asked for its free space: {error.strerror}; check the disk, or choose another"
            " --out"
        ) from error
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize
