"""A model on the Hugging Face Hub, read through huggingface_hub and its cache.

A revision is resolved to a commit once, and that commit is used for every file. Headers are read by ranged
requests, so that a model can be planned with before it is downloaded; files lie where huggingface_hub's cache has
them, `<cache>/models--org--name/snapshots/<commit>/<name>`, so other tools find them too, and the other way round.
Login, cache folder, endpoint and offline mode are the library's business (HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, hf_hub_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfUriError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.utils import parse_hf_uri, validate_repo_id
from tqdm import tqdm

from streamconv.errors import CheckpointError, HubError, OptionError, ResourceError
from streamconv.progress import OnBytes
from streamconv.sizes import format_size
from streamconv.storage.base import Origin, RangeReader, SourceFile
from streamconv.storage.blobs import HubFile
from streamconv.storage.cache import (
    cache_folder,
    contents_checked,
    is_cached,
    mark_passing,
    mark_unchecked,
    remove_passing,
)
from streamconv.storage.hub_errors import hub_errors
from streamconv.storage.listing import COMMIT, list_commit
from streamconv.storage.local import (
    LocalReader,
    check_name,
    check_range,
    check_subfolder,
    existing_folder,
    is_inside,
    open_file,
    open_folder,
    read_start,
)
from streamconv.storage.ranges import request_range

HF = "hf://"
_SPARE_DISK_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubFolder:
    """One commit of a model repository, or a subfolder of it; `folder` is where the cache keeps its files.

    `revision` is what was asked for; `files` are relative to the subfolder. `starts` has length and SHA-256 of what
    was read of a file by a ranged request, by name: it must be what the whole file then begins with.
    """

    location: str
    origin: Origin
    revision: str
    subfolder: str | None
    folder: Path
    files: Mapping[str, HubFile]
    starts: dict[str, tuple[int, str]] = field(default_factory=dict, compare=False)

    def names(self, subfolder: str | None = None) -> tuple[str, ...]:
        """Names of the files directly inside, or inside `subfolder`, sorted."""
        return tuple(sorted(name for name in self.files if name.rpartition("/")[0] == (subfolder or "")))

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly inside, sorted."""
        return tuple(sorted({name.partition("/")[0] for name in self.files if "/" in name}))

    def file(self, name: str) -> SourceFile:
        """The file `name`, whether it is here already or not."""
        check_name(name, self.location)
        if name not in self.files:
            raise CheckpointError(f"{self.location}: {name} is missing")
        found = self.files[name]
        reader = partial(HubReader, self.origin, self._path(name), found)
        return SourceFile(name, str(self.folder / name), found.size, f"blob:{found.blob}", open_remote=reader)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The whole content of a small file; downloads it if need be."""
        file = self.file(name)
        if file.size > limit:
            raise CheckpointError(
                f"{self.location}: {name} has {file.size} bytes, more than the {limit} such a file may have"
            )
        self.fetch((file,), lambda _: None)
        return read_start(file, limit)

    def read_start(self, file: SourceFile, length: int) -> bytes:
        """The first bytes of `file`, by a ranged request where it is not in the cache."""
        length = min(length, file.size)
        if not length or not self.missing((file,)):
            return read_start(file, length) if length else b""
        with hub_errors(self.origin.repo):
            start = request_range(self.origin, self._path(file.name), self.files[file.name], 0, length)
        if length > self.starts.get(file.name, (0, ""))[0]:
            self.starts[file.name] = (length, hashlib.sha256(start).hexdigest())
        return start

    def missing(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        """Those of `files` that are of this repository and not in the cache."""
        repo = self.origin.repo
        return tuple(file for file in self._own(files) if not is_cached(file, self.location, repo))

    def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
        """Download the missing ones, one after another, straight into the cache, and check every content.

        One at a time: each is already cut into parallel pieces where the Hub's Xet storage serves it, and an
        interrupt then ends the one download there is. What was begun is continued by the next call. Each is read
        once more while the next one comes, to compare it with what the Hub lists.
        """
        own = self._own(files)
        missing = self.missing(own)
        repo = self.origin.repo
        with hub_errors(repo):
            _check_space(self.folder, sum(file.size for file in missing))
            with contents_checked(self.location, repo) as check:
                for file in missing:
                    _log.info("downloading %s of %s (%s)", file.name, self.location, format_size(file.size))
                    mark_unchecked(file, repo)
                    if for_now:
                        mark_passing(file, repo)
                    path = hf_hub_download(
                        repo,
                        self._path(file.name),
                        revision=self.origin.commit,
                        tqdm_class=_counter(on_bytes, file.size),
                    )
                    check(file, Path(path))
        if missing:
            _note_commit(self.folder, self.subfolder, self.revision, self.origin.commit)
        for file in own:
            self._check_start(file)

    def open(self, file: SourceFile) -> RangeReader:
        """See Storage."""
        if not self.missing((file,)):
            return LocalReader(file, open_file(file))
        return HubReader(self.origin, self._path(file.name), self.files[file.name])

    def done(self, file: SourceFile) -> None:
        """See Storage."""
        for own in self._own((file,)):
            remove_passing(own, self.origin.repo)

    def _own(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        return tuple(file for file in files if file.path == str(self.folder / file.name))

    def _check_start(self, file: SourceFile) -> None:
        """Raise HubError unless the file begins with what was read before it was here."""
        length, sha256 = self.starts.pop(file.name, (0, ""))
        if length and hashlib.sha256(read_start(file, length)).hexdigest() != sha256:
            raise HubError(
                f"{self.location}: the first {length} bytes of {file.name} were other ones when its header was read"
                " than in the file that was downloaded, whose content is as the Hub lists it; run the same command"
                " again"
            )

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name


@dataclass(frozen=True, slots=True)
class HubReader:
    """A file of a commit, read by requests: a RangeReader. `path` is that in the repository."""

    origin: Origin
    path: str
    file: HubFile

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See RangeReader."""
        check_range(self.path, self.file.size, start, len(buffer))
        if len(buffer):
            with hub_errors(self.origin.repo):
                buffer[:] = request_range(self.origin, self.path, self.file, start, len(buffer))

    def close(self) -> None:
        """Nothing: each request is one of its own."""


def open_hub(location: str, revision: str | None, subfolder: str | None) -> HubFolder:
    """The model `location`: `org/name`, `org/name@revision`, or the same after `hf://`.

    Raises OptionError for what is no id of a model or has two revisions, HubError where the Hub does not show it.
    """
    repo, revision = parse_hub_id(location, revision)
    if subfolder is not None:
        check_subfolder(subfolder)
    try:
        with hub_errors(repo, revision):
            origin, files, _ = list_commit(repo, revision)
    except HubError as error:
        if not isinstance(error.__cause__, OfflineModeIsEnabled):
            raise
        origin, files = _cached_listing(repo, revision)
    prefix = f"{subfolder}/" if subfolder else ""
    inside = {
        name.removeprefix(prefix): file
        for name, file in files.items()
        if name.startswith(prefix) and is_inside(name)
    }
    if subfolder and not inside:
        raise HubError(f"{repo} has no folder {subfolder} at commit {origin.commit}")
    _log.info("%s: the Hub's %s at commit %s", location, repo, origin.commit)
    folder = cache_folder(repo) / "snapshots" / origin.commit / prefix
    return HubFolder(location, origin, revision, subfolder, folder, inside)


def parse_hub_id(location: str, revision: str | None) -> tuple[str, str]:
    """Repository and revision (`main` if none is given) that a Hub id names. Raises OptionError."""
    try:
        repo, found = _parse_uri(location) if location.startswith(HF) else _parse_id(location)
    except (HfUriError, HFValidationError) as error:
        raise OptionError(
            f"{location!r} is neither a folder here nor the id of a model, expected org/name, org/name@revision or"
            f" hf://org/name@revision; {error}"
        ) from error
    if found is not None and revision is not None:
        raise OptionError(
            f"{location} has a revision already, and {revision} was given beside it; leave one of them out"
        )
    revision = found if found is not None else revision
    if revision is not None and not is_inside(revision):
        raise OptionError(f"{location}: {revision!r} is not a revision; give a branch, a tag or a commit")
    return repo, revision or constants.DEFAULT_REVISION


def _parse_uri(location: str) -> tuple[str, str | None]:
    if location.startswith(f"{HF}/"):  # the library would read hf:///etc/x as the model etc/x
        raise HfUriError(location, "It begins with a slash.")
    found = parse_hf_uri(location)
    if found.type != "model":
        raise HfUriError(location, f"It names a {found.type}, not a model.")
    if found.path_in_repo:
        raise HfUriError(location, "It goes on with a path; --adapter-subfolder takes that of an adapter.")
    return found.id, found.revision


def _parse_id(location: str) -> tuple[str, str | None]:
    repo, at, revision = location.partition("@")
    validate_repo_id(repo)
    return repo, revision if at else None


def _cached_listing(repo: str, revision: str) -> tuple[Origin, dict[str, HubFile]]:
    """The same from the cache alone: all files of the commit where a download noted them, else those there are."""
    try:
        commit = HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved
    except RevisionResolutionError as error:
        raise _not_cached(repo, revision) from error
    origin = Origin(repo, commit)
    snapshot = cache_folder(repo) / "snapshots" / commit
    if not snapshot.is_dir():
        raise _not_cached(repo, revision)
    files: dict[str, HubFile] = {}
    with contextlib.suppress(CachedRepoTreeNotFoundError):
        tree = get_cached_repo_tree(repo, revision=commit)
        files |= {file.path: HubFile(file.size, file.blob_id) for file in tree}
    cached = open_folder(str(snapshot))
    for path in snapshot.rglob("*"):
        if not path.is_dir():
            file = cached.file(str(path.relative_to(snapshot)))
            size = files[file.name].size if file.name in files else file.size
            files[file.name] = HubFile(size, file.version.partition(":")[2])
    return origin, files


def _not_cached(repo: str, revision: str) -> HubError:
    return HubError(
        f"{repo} at {revision} is not in the Hub cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset"
        " it, or download the model first with `hf download`"
    )


def _check_space(folder: Path, nbytes: int) -> None:
    """Raise ResourceError unless the cache's disk can take `nbytes` more."""
    if not nbytes:
        return
    free = shutil.disk_usage(existing_folder(folder)).free
    if nbytes + _SPARE_DISK_BYTES > free:
        raise ResourceError(
            f"the download needs {format_size(nbytes)} and the disk of the Hub cache ({constants.HF_HUB_CACHE}) has"
            f" {format_size(free)} free; free some, or set HF_HOME to a folder on another disk"
        )


def _note_commit(folder: Path, subfolder: str | None, revision: str, commit: str) -> None:
    """Note which commit a revision's name stood for, as the library does, so that it is found when offline.

    The library notes it for files it fetches by that name; here they are fetched by commit, lest the name move
    in between.
    """
    if COMMIT.fullmatch(revision):
        return
    depth = len(Path(subfolder).parts) if subfolder else 0
    note = folder.parents[depth + 1] / "refs" / revision
    with contextlib.suppress(OSError):  # a convenience: what was downloaded is here all the same
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.streamconv")
        temporary.write_text(commit)
        temporary.replace(note)


def _counter(on_bytes: Callable[[int], None], size: int) -> type[tqdm]:
    """A progress bar that draws nothing and passes the bytes on; never more of a file than it has."""
    left = size

    class Counter(tqdm):  # type: ignore[misc]  # tqdm has no annotations of its own
        monitor_interval = 0  # no thread that looks after slow bars

        def __init__(self, *args: Any, **options: Any) -> None:
            # Xet has two bars for one file; the other counts what came over the wire, compressed.
            self.counts = "downloading bytes" not in str(options.get("desc"))
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal left
            if self.counts and n and n > 0:
                done = min(int(n), left)
                left -= done
                on_bytes(done)

    return Counter
