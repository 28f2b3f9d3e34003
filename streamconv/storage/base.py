"""Interface of a place where checkpoints live."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from streamconv.progress import OnBytes


@dataclass(frozen=True, slots=True)
class FileStatus:
    """Status of a file as inode(7) has it: the time of its last change of whatever kind, which nobody can set, and what
    else than content such a change may be of.
    """

    changed_ns: int
    inode: int
    mode: int
    owner: tuple[int, int]
    links: int

    def is_rewritten(self, before: FileStatus) -> bool:
        """Whether it was written to since, or another file took its place.

        A change of permissions, owner or hard links, as a backup makes it, is none.
        """
        others = (self.mode, self.owner, self.links) != (before.mode, before.owner, before.links)
        return self.changed_ns != before.changed_ns and not (others and self.inode == before.inode)


class RangeReader(Protocol):
    """A file of a storage, open to be read by ranges where it lies: on a disk here, or by requests."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (of bytes) with the file's content from byte `start` on.

        Raises CheckpointError where the file ends before that or is not the one that was opened, HubError or
        StoreError where a request fails for good.
        """

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One regular file of an input.

    `name` is relative to the input's folder and is what messages and plans show; `path` is where the bytes
    are, or will be once they are fetched; `version` changes when the content does (a Hub blob id, an object's ETag,
    else the modification time), and never depends on where the folder lies. `status` tells a file that was written to
    from one that was not, whatever its modification time; None for what is not here yet. It is no part of what makes
    two files the same. `is_own` is a file that a run has made for itself, in the folder of its output. `open_remote`
    opens it by requests where it is not on this machine; None for a file that is on a disk here in any case.
    """

    name: str
    path: str
    size: int
    version: str
    status: FileStatus | None = field(default=None, compare=False)
    is_own: bool = field(default=False, compare=False)
    open_remote: Callable[[], RangeReader] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Origin:
    """Hub repository that an input is from: `org/name`, and the commit (40 hex digits)."""

    repo: str
    commit: str


class Storage(Protocol):
    """A folder of files: on a disk here, on the Hub, or below a prefix of an object store."""

    @property
    def location(self) -> str:
        """Location as the user gave it: for messages."""

    @property
    def origin(self) -> Origin | None:
        """The Hub repository and commit the files are from; None for a folder of one's own."""

    def names(self, subfolder: str | None = None) -> tuple[str, ...]:
        """Names of the files directly inside, sorted; or `subfolder/name` of those in a subfolder, if it is there."""

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly inside, sorted; `names` lists the files of each."""

    def file(self, name: str) -> SourceFile:
        """The file `name`. Raises CheckpointError if it is missing, not a regular file, or leads outside."""

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The whole content of a small file. Raises CheckpointError if it is longer than `limit` bytes."""

    def read_start(self, file: SourceFile, length: int) -> bytes:
        """The first `length` bytes of `file`, or all of it if it is shorter; does not fetch the rest."""

    def missing(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        """Those of `files` that belong to this storage and are not on this machine yet."""

    def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
        """Bring the missing ones of `files` to this machine: their `path` can be opened afterwards.

        Those that are fetched `for_now`, `done` removes again. `on_bytes` may raise to end it; what was begun is
        continued by the next call.
        """

    def open(self, file: SourceFile) -> RangeReader:
        """`file`, to be read by ranges where it lies: what is not on this machine is not fetched for it."""

    def done(self, file: SourceFile) -> None:
        """Remove `file` from this machine if it was fetched for now, by this process or another; nobody may read it."""
