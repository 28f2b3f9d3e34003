"""Files of a work folder that a later run goes on with, checked against the SHA-256 that was recorded of each.

    hashes    a line `SHA-256  NAME` for each file, as sha256sum writes them; of two with one name the later counts

A line is on the disk before its file has its name. What a file system, a disk or a person has changed since then is
so not taken for what was written: it is made again. A damaged line is as good as none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from streamconv.checkpoint.own_files import identify, open_own, read_error, read_own
from streamconv.checkpoint.writer import close_written, write_error

DIGESTS = "hashes"
_LINE = re.compile(rb"([0-9a-f]{64})  ([^\n]+)\n")
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
        descriptor = open_recorded(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
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
            close_written(descriptor, self._path)
        self._digests |= digests

    def is_whole(self, path: Path, name: str | None = None, on_chunk: OnChunk = lambda: None) -> bool:
        """Whether the file at `path` is there and is the one recorded as `name`, its own where none is given."""
        recorded = self._digests.get(name or path.name)
        found = None if recorded is None else identify(path, lambda _: on_chunk())
        return found is not None and found.sha256 == recorded


def open_recorded(path: Path, flags: int) -> int:
    """A descriptor of a file in a work folder. Raises OutputError where it is a link, a folder or a pipe."""
    try:
        return open_own(path, flags)
    except OSError as error:
        raise (write_error if flags & _WRITES else read_error)(error, path) from error


def _read(path: Path) -> Mapping[str, str]:
    content = read_own(path, _MOST_BYTES) or b""
    lines = (_LINE.fullmatch(line) for line in content.splitlines(keepends=True))
    return {found[2].decode(errors="replace"): found[1].decode() for found in lines if found is not None}
