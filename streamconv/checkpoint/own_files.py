"""Files that a run has made for itself: opened without following links, told apart from others, and hashed.

What lies where a run keeps its own may have been put there by anybody: a link to something precious, a named pipe that
nobody writes to, a file of another run. So all is looked at as it is (lstat), and only regular files are opened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import OutputError, StreamconvError
from streamconv.storage.hashing import hash_range
from streamconv.storage.local import FILE, close_quietly, kind_of
from streamconv.system_errors import lacking


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A finished file, to be known again under any name: `device` and `inode`, its size in bytes, when it was last
    written to in nanoseconds, and the SHA-256 of its content.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    sha256: str


def identity_of(found: os.stat_result, sha256: str) -> FileIdentity:
    """Identity of a file with this status and content."""
    return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, sha256)


def kind_at(path: Path) -> str | None:
    """Kind of what has this name, in words, a link not followed; None where there is nothing. Raises OutputError."""
    try:
        return kind_of(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise read_error(error, path) from error


def size_of(path: Path) -> int | None:
    """Size of a regular file in bytes, a link not followed; None where there is none. Raises OutputError."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise read_error(error, path) from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def check_kind(path: Path, wanted: str) -> None:
    """Raise OutputError unless `path` is of the kind that is `wanted`, or not there."""
    found = kind_at(path)
    if found not in (None, wanted):
        raise odd_kind(path, found or "", wanted)


def odd_kind(path: Path, found: str, wanted: str = FILE) -> OutputError:
    """The error for something at `path` that no run of ours would have made."""
    return OutputError(
        f"{path} is {found}, and must be {wanted} that streamconv made itself; nothing there was changed: move it away,"
        " or choose another --out"
    )


def open_own(path: Path, flags: int) -> int:
    """A descriptor of the regular file `path` itself, which nothing stands in for; it does not survive an exec.

    Raises FileNotFoundError where there is none, unless `flags` make one, and OutputError for what is no such file.
    """
    try:
        # Without O_NONBLOCK a named pipe would wait for who is at its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            found = kind_at(path)
            if found not in (None, FILE):
                raise odd_kind(path, found or "") from error
        raise
    try:
        found_mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(found_mode):
            raise odd_kind(path, kind_of(found_mode))
    except BaseException:
        close_quietly(descriptor)
        raise
    return descriptor


def read_own(path: Path, limit: int) -> bytes | None:
    """Content of a small file; None where there is none, or one of more than `limit` bytes. Raises OutputError."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size > limit:
                return None
            content = bytearray()
            while len(content) <= limit and (part := stream.read(limit + 1 - len(content))):
                content += part
            return bytes(content) if len(content) <= limit else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(error, path) from error


def identify(path: Path, on_bytes: Callable[[int], None]) -> FileIdentity | None:
    """Identity of a file, read whole; `on_bytes` is told how many bytes were read. None where there is none.

    Raises OutputError where it is no regular file, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        descriptor = open_own(path, os.O_RDONLY)
        try:
            hash_range(digest, descriptor, on_bytes=on_bytes)
            return identity_of(os.fstat(descriptor), digest.hexdigest())
        finally:
            close_quietly(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(error, path) from error


def known_again(path: Path, known: FileIdentity) -> FileIdentity | None:
    """The file at `path` if it is the very one that is known, or has its content; else None.

    Only where it does not look like the one known is it read: file systems over a network may number files anew.
    Raises OutputError where it cannot be looked at.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise read_error(error, path) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != known.size:
        return None
    if identity_of(found, known.sha256) == known:
        return known
    again = identify(path, lambda _: None)
    return again if again is not None and again.sha256 == known.sha256 else None


@dataclass(frozen=True, slots=True)
class Sighting:
    """Facts of a finished file by which another process, maybe on another machine, knows it again without reading:
    there the number of its device is another one.
    """

    inode: int
    size: int
    modified_ns: int


def recognize(path: Path, seen: Sighting, sha256: str) -> FileIdentity | None:
    """Identity of the file at `path` if it looks as another process saw it; else None. Raises OutputError."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise read_error(error, path) from error
    looks = Sighting(found.st_ino, found.st_size, found.st_mtime_ns)
    return identity_of(found, sha256) if stat.S_ISREG(found.st_mode) and looks == seen else None


def read_error(error: OSError, path: Path) -> StreamconvError:
    """The error of ours for one of the system's while a file of the output, or its folder, is looked at."""
    return lacking(error) or OutputError(
        f"{path} cannot be read: {error.strerror}; check the disk and its permissions, or choose another --out"
    )
