"""The Hub's cache on this machine: whether a file in it is whole, and the check of one that was just downloaded.

A file has the content's id as its name in `models--org--name/blobs/`, or is a link from there to the store that all
models share, and a link to that in `snapshots/<commit>/` (huggingface_hub docs, "Understand caching"). One that came
with another content than the Hub lists is removed, so that the next download brings it anew. One that was downloaded
by other tools is trusted by its size: to read every base once more costs minutes, and `hf cache verify` does it.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from streamconv.errors import CheckpointError, HubError, Stopped
from streamconv.sizes import format_size
from streamconv.storage.base import SourceFile
from streamconv.storage.blobs import content_id
from streamconv.threads import Future, Pool

_LIST_AGAIN = "the same command then downloads it again"


def cache_root() -> Path:
    """The folder that all cached repositories lie in."""
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def cache_folder(repo: str) -> Path:
    """The folder of one model."""
    return cache_root() / repo_folder_name(repo_id=repo, repo_type="model")


def is_cached(file: SourceFile, location: str, repo: str) -> bool:
    """Whether the file is in the cache, whole as far as its size tells, and checked if we downloaded it.

    Raises CheckpointError for one of another size: it would be taken for the file by every tool, for ever.
    """
    try:
        found = Path(file.path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(
            f"{location}: {file.name} cannot be read in the Hub cache: {error.strerror} ({file.path})"
        ) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
        kind = f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "something that is no file"
        raise CheckpointError(
            f"{location}: {file.name} in the Hub cache is not whole: it has {kind}, and the Hub lists {file.size}"
            f" bytes; remove {os.path.realpath(file.path)} ({_LIST_AGAIN})"
        )
    return not _mark(file, repo).exists()


def _mark(file: SourceFile, repo: str, state: str = "unchecked") -> Path:
    """An empty file, there from before a download until its content was checked: a kill comes at any time.

    Or, as `passing`, until the file is removed.
    """
    blob = file.version.partition(":")[2]
    return cache_root() / ".locks" / cache_folder(repo).name / f"{blob}.streamconv-{state}"


def mark_unchecked(file: SourceFile, repo: str) -> None:
    """Note that the file's content is still to be checked."""
    _set(_mark(file, repo))


def mark_passing(file: SourceFile, repo: str) -> None:
    """Note of a file that is yet to come that it is for a run alone, and may be removed when that has read it.

    One whose content is here already, of another revision, is not noted: it is used by that, too.
    """
    if not (cache_folder(repo) / "blobs" / file.version.partition(":")[2]).exists():
        _set(_mark(file, repo, "passing"))


def remove_passing(file: SourceFile, repo: str) -> None:
    """Remove a file of the cache that is marked so. One that cannot be removed stays, and so does its mark."""
    mark = _mark(file, repo, "passing")
    if mark.exists() and remove_cached(Path(file.path)) is None:
        mark.unlink(missing_ok=True)


def _set(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


@contextmanager
def contents_checked(location: str, repo: str) -> Iterator[Callable[[SourceFile, Path], None]]:
    """Function that checks a file that came to a path, in a thread: beside the download of the next one.

    It raises what the check before it found, and leaving the context what the last one found: HubError.
    """
    stopped, pending = threading.Event(), list[Future[None]]()

    def go_on(_: int) -> None:
        if stopped.is_set():
            raise Stopped("stopped", 0)  # seen by nobody: what ended the download is raised

    def check(file: SourceFile, path: Path) -> None:
        if pending:
            pending.pop().result()
        pending.append(pool.submit(_check, file, path, location, repo, go_on))

    pool = Pool(1, "contents")
    try:
        yield check
        for last in pending:
            last.result()
    finally:
        stopped.set()
        pool.shutdown()


def _check(file: SourceFile, path: Path, location: str, repo: str, on_bytes: Callable[[int], None]) -> None:
    """Raise HubError unless `path` is where the file was expected, with the size and content that the Hub lists."""
    if path != Path(file.path):
        raise HubError(
            f"{location}: {file.name} came to {path}, expected {file.path}: the Hub answers with another commit than it"
            " listed; run the same command again"
        )
    listed = file.version.partition(":")[2]
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        found = content_id(stream, size, listed, on_bytes) if size == file.size else None
    if found == listed:
        _mark(file, repo).unlink(missing_ok=True)
        return
    left = remove_cached(path)
    removed = f"remove {left}" if left else "it was removed from the Hub cache"
    differs = (
        f"with {size} bytes, expected {file.path} with {file.size}"
        if found is None
        else f"({format_size(size)}) with another content than the Hub lists: {found}, expected {listed}"
    )
    raise HubError(
        f"{location}: {file.name} came to {path} {differs}; {removed}: {_LIST_AGAIN}. If it comes so again, something"
        " between the Hub and here alters files (a proxy, a mirror, memory or disk)"
    )


def remove_cached(path: Path) -> Path | None:
    """Remove a file of a snapshot, every link on the way to it, and it; the one that cannot be removed, if any."""
    root = cache_root()
    chain = [path]
    while chain[-1].is_symlink():
        target = Path(os.path.normpath(chain[-1].parent / chain[-1].readlink()))
        if not target.is_relative_to(root) or target in chain:
            break
        chain.append(target)
    for each in reversed(chain):
        try:
            each.unlink(missing_ok=True)
        except OSError:
            return each
    return None
