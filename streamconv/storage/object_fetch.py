"""Download of an object into the cache: pieces that are asked for side by side and written in order.

    <name>.partial   what has come so far, from the first byte without a hole; a later call goes on behind it
    <name>.passing   empty; the file is here for a run alone

The folder is named by the content, so what an earlier run has left is of the same content. One process at a time
downloads a file: it holds a lock on the partial one.

Many ETags are the MD5 of the content: of S3's objects that were uploaded in one part, of most of Google's. That of an
object that its bucket encrypts by a key of its own looks the same and is none. So content of another MD5 is fetched
once more: if it is the same again, the ETag is no MD5; if not, something on the way alters it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamconv.errors import ResourceError, StoreError, StreamconvError
from streamconv.progress import OnBytes
from streamconv.storage.base import SourceFile
from streamconv.storage.hashing import hash_range
from streamconv.storage.local import close_quietly
from streamconv.system_errors import lacking
from streamconv.threads import Future, Pool

PIECE_BYTES = 4 * 2**20
"""Bytes of one request: large enough that its latency is little, small enough to be asked for again."""

REQUESTS = 8
"""Requests that are under way at once."""

_LOOK_EVERY_S = 0.2

Read = Callable[[int, int], memoryview]
"""Bytes of the object from a start on, as many as asked for."""


def is_whole(file: SourceFile) -> bool:
    """Whether the file is here with its size; it gets its name when it is complete."""
    try:
        return os.stat(file.path).st_size == file.size  # noqa: PTH116  a path as text, straight to the kernel
    except OSError:
        return False


def download(file: SourceFile, read: Read, on_bytes: OnBytes, md5: str | None = None) -> None:
    """Bring the file to its path; `md5` is what may be the hash of its content, in hexadecimal digits.

    Raises what `read` and `on_bytes` raise, ResourceError for a full disk, StoreError where two downloads differ.
    """
    path = Path(file.path)
    with _writing(file):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path, on_bytes) as descriptor:
            if is_whole(file):  # by another process meanwhile
                on_bytes(file.size)
                return
            found = _fill(file, read, descriptor, on_bytes)
            if md5 is not None and found != md5:
                os.ftruncate(descriptor, 0)
                again = _fill(file, read, descriptor, lambda _: on_bytes(0))
                if again not in (found, md5):
                    raise StoreError(
                        f"{file.name} came with another content each time (MD5 {found}, then {again}, and the store"
                        f" says {md5}); something between the store and here alters files (a proxy, memory or disk)"
                    )
            os.fsync(descriptor)
            _side(file, "partial").replace(path)


def mark_passing(file: SourceFile) -> None:
    """Note of a file that is yet to come that it is for a run alone, and may be removed when that has read it."""
    with _writing(file):
        mark = _side(file, "passing")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def remove_passing(file: SourceFile) -> None:
    """Remove a file that is marked so. One that cannot be removed stays, and so does its mark."""
    mark = _side(file, "passing")
    with contextlib.suppress(OSError):
        if mark.exists():
            Path(file.path).unlink(missing_ok=True)
            mark.unlink()
            mark.parent.rmdir()


def _fill(file: SourceFile, read: Read, descriptor: int, on_bytes: OnBytes) -> str:
    """Write what is missing behind what is there; the MD5 of all of it."""
    there = os.fstat(descriptor).st_size
    if there > file.size:
        os.ftruncate(descriptor, 0)
        there = 0
    digest = hashlib.md5(usedforsecurity=False)
    hash_range(digest, descriptor, 0, there)
    on_bytes(there)
    pending: deque[tuple[Future[memoryview], int]] = deque()
    starts = iter(range(there, file.size, PIECE_BYTES))

    def ask() -> None:
        for start in starts:
            pending.append((pool.submit(read, start, min(PIECE_BYTES, file.size - start)), start))
            return

    with Pool(REQUESTS, "download") as pool:
        for _ in range(REQUESTS):
            ask()
        while pending:
            future, start = pending.popleft()
            piece = future.result()
            del future  # and with it the piece, once it is written
            digest.update(piece)
            _write(descriptor, piece, start)
            on_bytes(len(piece))
            ask()
    return digest.hexdigest()


def _write(descriptor: int, piece: memoryview, start: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(descriptor, piece[done:], start + done)


@contextmanager
def _partial(path: Path, on_bytes: OnBytes) -> Iterator[int]:
    """The partial file, open and locked; `on_bytes` may end the wait for another process."""
    partial = path.with_name(f"{path.name}.partial")
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not _locked(descriptor):
                on_bytes(0)
                time.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), partial.stat()):
                    yield descriptor
                    return
            if path.exists():  # another process has finished and given it its name
                yield descriptor
                return
        finally:
            close_quietly(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: its user runs one at a time
        return True
    return True


def _side(file: SourceFile, state: str) -> Path:
    path = Path(file.path)
    return path.with_name(f"{path.name}.{state}")


@contextmanager
def _writing(file: SourceFile) -> Iterator[None]:
    """Raise what the disk refuses as a ResourceError."""
    try:
        yield
    except StreamconvError:
        raise
    except OSError as error:
        raise lacking(error) or ResourceError(
            f"{file.name} cannot be written to the cache ({file.path}): {error.strerror}; make it writable, or set"
            " HF_HOME to another folder"
        ) from error
