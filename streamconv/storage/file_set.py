"""Files from several places, and some that exist in memory alone, as one folder for libraries that read folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.errors import ResourceError
from streamconv.storage.base import SourceFile
from streamconv.storage.local import close_quietly, open_file


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files by name: `paths` on this machine, and `contents`. `folder` is set where they lie in one as they are.

    `sources` are those that were planned with, which have to stay as they were.
    """

    paths: Mapping[str, Path]
    contents: Mapping[str, bytes] = field(default_factory=dict)
    folder: Path | None = None
    sources: Sequence[SourceFile] = ()

    @contextmanager
    def as_folder(self) -> Iterator[Path]:
        """A folder with these files: their own, or one of links that is removed in the end.

        Raises CheckpointError once it has been read, if a source has changed, and ResourceError where there is no
        place for temporary files.
        """
        with self._folder() as folder:
            yield folder
        for file in self.sources:
            close_quietly(open_file(file))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        if self.folder is not None:
            yield self.folder
            return
        with temporary_folder() as folder:
            try:
                self._fill(folder)
            except OSError as error:
                raise ResourceError(
                    f"{folder}: the tokenizer's files do not fit there: {error.strerror}; free some disk, or set "
                    "TMPDIR to another place"
                ) from error
            yield folder

    def _fill(self, folder: Path) -> None:
        for file, path in self.paths.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(path.absolute())
        for file, content in self.contents.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder where temporary files go (TMPDIR), removed at the end as far as that is possible.

    Raises ResourceError where none can be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="streamconv-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ResourceError(
            f"no folder for temporary files can be made: {error.strerror}; free some disk, or set TMPDIR to a place "
            "that takes them"
        ) from error
    with folder as name:
        yield Path(name)
