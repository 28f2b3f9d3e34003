"""Files held open while they are uploaded: what was checked is what is sent, whatever happens to its name meanwhile.

A folder may hold links that others put there, and a name may be another file by the time a library opens it. So a file
is opened once, following no link, and is known to that library by its descriptor.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import CheckpointError, InputError, ResourceError
from streamconv.storage.local import close_quietly, open_folder
from streamconv.system_errors import OPEN_FILES, lacking

_DESCRIPTORS = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class HeldFile:
    """An open file: where its name leads, its descriptor, and size and modification time when it was opened."""

    real: Path
    descriptor: int
    size: int
    modified_ns: int

    @property
    def path(self) -> Path:
        """A path by which others read this file, not what has its name by then; the name itself off Linux."""
        held = _DESCRIPTORS / str(self.descriptor)
        return held if held.exists() else self.real

    def check(self, by_name: bool = False) -> None:
        """Raise InputError if the file was written to since; with `by_name`, if its name is another file's, too."""
        found = os.fstat(self.descriptor)
        same = (found.st_size, found.st_mtime_ns) == (self.size, self.modified_ns)
        if same and by_name:
            try:
                same = os.path.samestat(found, self.real.lstat())
            except OSError:
                same = False
        if not same:
            raise InputError(f"{self.real} changed while it was pushed; push again once nothing writes to it")


@contextmanager
def hold(folder: Path, names: Iterable[str]) -> Iterator[Mapping[str, HeldFile]]:
    """Open files of a folder, by name, until the end.

    Raises InputError for one that is no regular file, or whose name leads out of the folder.
    """
    with ExitStack() as stack:
        held = {}
        for name in names:
            held[name] = _open(folder, name)
            stack.callback(close_quietly, held[name].descriptor)
        yield held


def _open(folder: Path, name: str) -> HeldFile:
    real = _real(folder, name)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        descriptor = os.open(real, flags)
    except OSError as error:
        if error.errno in OPEN_FILES:
            raise ResourceError(
                f"{folder} has more files than may be open at once; raise the limit (`ulimit -n`), then push again"
            ) from error
        raise lacking(error) or InputError(f"{real} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        held = HeldFile(real, descriptor, found.st_size, found.st_mtime_ns)
        # A folder on the way may have become a link since its name was looked up.
        if not stat.S_ISREG(found.st_mode) or _opened(held) != str(real):
            raise InputError(f"{real} changed while it was pushed; push again once nothing writes to it")
    except BaseException:
        close_quietly(descriptor)
        raise
    return held


def _opened(held: HeldFile) -> str:
    """The path of what was opened."""
    link = _DESCRIPTORS / str(held.descriptor)
    return str(link.readlink()) if link.exists() else os.path.realpath(held.real)


def _real(folder: Path, name: str) -> Path:
    try:
        return Path(open_folder(str(folder)).file(name).path)
    except CheckpointError as error:
        path = folder / name
        real = os.path.realpath(path)
        if real == str(folder.resolve() / name):
            raise InputError(f"{error}; move it elsewhere, then push again") from error
        raise InputError(
            f"{path} is a link that leads outside the output, to {real}: what lies elsewhere is not uploaded; remove"
            " the link, or put a copy of the file in its place, then push again"
        ) from error
