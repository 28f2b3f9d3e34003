"""What the rest of streamconv may ask of a place where checkpoints live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One regular file of an input.

    `name` is relative to the input's folder and is what messages and plans show; `path` is where the bytes
    are; `version` changes when the content does (a Hub blob id, else the modification time), and never
    depends on where the folder lies.
    """

    name: str
    path: str
    size: int
    version: str


class Storage(Protocol):
    """A folder of files, local or cached from elsewhere."""

    @property
    def location(self) -> str:
        """As the user gave it: for messages."""

    def names(self) -> tuple[str, ...]:
        """Names of the files directly inside, sorted."""

    def file(self, name: str) -> SourceFile:
        """The file `name`. Raises CheckpointError if it is missing, not a regular file, or leads outside."""

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The whole content of a small file. Raises CheckpointError if it is longer than `limit` bytes."""
