"""Files from several places, and some that exist in memory alone, as one folder for libraries that read folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files by name: `paths` on this machine, and `contents`. `folder` is set where they lie in one as they are."""

    paths: Mapping[str, Path]
    contents: Mapping[str, bytes] = field(default_factory=dict)
    folder: Path | None = None

    @contextmanager
    def as_folder(self) -> Iterator[Path]:
        """A folder with these files: their own, or one of links that is removed in the end."""
        if self.folder is not None:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="streamconv-") as name:
            folder = Path(name)
            for file, path in self.paths.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).symlink_to(path.absolute())
            for file, content in self.contents.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            yield folder
