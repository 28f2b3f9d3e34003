"""Downloads from the Hub that a job needs before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamconv.checkpoint.own_files import read_error
from streamconv.checkpoint.writer import free_bytes
from streamconv.errors import ResourceError
from streamconv.output.journal import is_owned
from streamconv.pipeline.arriving import held_at_once
from streamconv.pipeline.contents import check_contents
from streamconv.pipeline.place import check_out, unfinished
from streamconv.pipeline.preparation import Prepared
from streamconv.progress import Meter, OnProgress
from streamconv.sizes import format_size
from streamconv.storage.local import existing_folder
from streamconv.system_errors import translated


def fetch(prepared: Prepared, out: Path, on_progress: OnProgress) -> None:
    """Download what a job needs before it runs; nothing if `out` holds its results already.

    That is all but the shards of a base that each are read once: those come while the run goes on. Whatever would make
    the run fail is refused before: a place that cannot be written to, a disk that is too small. An interrupted download
    goes on with the next call.
    """
    with translated(out):
        small = prepared.small_files()
        for storage, _ in prepared.downloads():
            storage.fetch(small, lambda _: None)
        check_out(prepared, out)
        if not (todo := unfinished(prepared, out)):
            return
        check_contents(prepared)
        _check_room(prepared, todo, out)
        downloads = prepared.downloads_before()
        meter = Meter(sum(file.size for _, files in downloads for file in files), on_progress)
        for storage, files in downloads:
            storage.fetch(files, meter.add)


def _check_room(prepared: Prepared, todo: Sequence[tuple[Prepared, Path]], out: Path) -> None:
    """Raise ResourceError if the outputs would not fit beside what is downloaded; of a resumed one, part is there."""
    disk = _disk_of(out)
    passing = {shard.file for shard in prepared.base.index.shards} if prepared.job.low_disk else set()
    downloads = [file for _, files in prepared.downloads() for file in files]
    sizes = [
        each.plan.disk + sum(file.size for file in each.copied)
        for each, at in todo
        if not is_owned(at) and _disk_of(at) == disk
    ]
    if not sizes:
        return
    on_same_disk = [file for file in downloads if _disk_of(Path(file.path)) == disk]
    needed = sum(sizes) + sum(file.size for file in on_same_disk if file not in passing)
    if passing.intersection(on_same_disk):
        needed += held_at_once(prepared)[1]
    if needed > (free := free_bytes(_nearest(out) / out.name)):
        beside = " with the download, whose cache is on the same disk," if on_same_disk else ""
        raise ResourceError(
            f"{out} needs {format_size(needed)}{beside} and its disk has {format_size(free)} free; free some, or choose"
            " another --out"
        )


def _disk_of(path: Path) -> int:
    try:
        return _nearest(path).stat().st_dev
    except OSError as error:
        raise read_error(error, path) from error


def _nearest(path: Path) -> Path:
    """The folder nearest to `path` that exists. Raises OutputError where that cannot be found out."""
    try:
        return existing_folder(path)
    except OSError as error:
        raise read_error(error, path) from error
