"""Some files of a storage as a storage of their own, with small ones that exist in memory alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from streamconv.errors import CheckpointError
from streamconv.progress import OnBytes
from streamconv.storage.base import Origin, RangeReader, SourceFile, Storage


@dataclass(frozen=True, slots=True)
class ChosenFiles:
    """The files `inner` has, without those `hidden`, which the user called `location`; `contents` are made in memory.

    A file in memory hides one of its name. It can be read, and is no SourceFile: nothing can copy it from a disk.
    """

    inner: Storage
    location: str
    hidden: frozenset[str] = frozenset()
    contents: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def origin(self) -> Origin | None:
        return self.inner.origin

    def names(self, subfolder: str | None = None) -> tuple[str, ...]:
        """See Storage."""
        found = [name for name in self.inner.names(subfolder) if name not in self.hidden]
        return tuple(sorted({*found, *(() if subfolder else self.contents)}))

    def folders(self) -> tuple[str, ...]:
        return self.inner.folders()

    def file(self, name: str) -> SourceFile:
        """See Storage."""
        if name in self.contents or name in self.hidden:
            raise CheckpointError(f"{self.location}: {name} is missing")
        return self.inner.file(name)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """See Storage."""
        made = self.contents.get(name)
        if made is None:
            return self.inner.read_bytes(name, limit)
        if len(made) > limit:
            raise CheckpointError(
                f"{self.location}: {name} has {len(made)} bytes, more than the {limit} such a file may have"
            )
        return made

    def read_start(self, file: SourceFile, length: int) -> bytes:
        return self.inner.read_start(file, length)

    def missing(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        return self.inner.missing(files)

    def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
        self.inner.fetch(files, on_bytes, for_now)

    def open(self, file: SourceFile) -> RangeReader:
        return self.inner.open(file)

    def done(self, file: SourceFile) -> None:
        self.inner.done(file)
