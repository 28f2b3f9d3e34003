"""A model below a prefix of an object store: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.

All objects are listed once, and every later request asks for the content of that listing (If-Match with its ETag): one
that was written to since is refused, not mixed. Headers are read by ranged requests, so that a model can be planned
with before it is downloaded. Files that are fetched lie in `<HF_ASSETS_CACHE>/streamconv/objects`, below HF_HOME where
that is set, each in a folder of its ETag; an object that changes never takes another's place.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from streamconv.errors import CheckpointError, InputError, OptionError, ResourceError
from streamconv.progress import OnBytes
from streamconv.sizes import format_size
from streamconv.storage.base import RangeReader, SourceFile
from streamconv.storage.local import (
    LocalReader,
    check_name,
    check_range,
    check_subfolder,
    existing_folder,
    is_inside,
    open_file,
    read_start,
)
from streamconv.storage.object_client import Bucket, StoredObject
from streamconv.storage.object_errors import ObjectChanged
from streamconv.storage.object_fetch import download, is_whole, mark_passing, remove_passing

SCHEMES = ("s3", "gs", "az")
SPARE_DISK_BYTES = 64 * 2**20
"""Bytes of a disk that a download leaves free."""

_LOCATION = re.compile(r"(s3|gs|az)://([^/?#@\s]+)(?:/(.*))?")
_UNUSUAL = re.compile(r"[^\w.-]+")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectFolder:
    """Objects below a prefix as they were listed; `folder` is where the cache keeps what is fetched of them."""

    location: str
    bucket: Bucket
    folder: Path
    objects: Mapping[str, StoredObject]
    origin: None = field(default=None, compare=False)

    def names(self, subfolder: str | None = None) -> tuple[str, ...]:
        """Names of the files directly inside, or inside `subfolder`, sorted."""
        return tuple(sorted(name for name in self.objects if name.rpartition("/")[0] == (subfolder or "")))

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly inside, sorted."""
        return tuple(sorted({name.partition("/")[0] for name in self.objects if "/" in name}))

    def file(self, name: str) -> SourceFile:
        """The file `name`, whether it is here already or not."""
        check_name(name, self.location)
        if name not in self.objects:
            raise CheckpointError(f"{self.location}: {name} is missing")
        found = self.objects[name]
        version = found.etag or f"modified {found.modified.isoformat()}"
        path = self.folder / hashlib.sha256(f"{found.key}\0{version}".encode()).hexdigest()[:20] / name
        reader = partial(ObjectReader, self.location, name, self.bucket, found)
        return SourceFile(name, str(path), found.size, f"object:{version}", open_remote=reader)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The whole content of a small file, from the cache or by one request."""
        file = self.file(name)
        if file.size > limit:
            raise CheckpointError(
                f"{self.location}: {name} has {file.size} bytes, more than the {limit} such a file may have"
            )
        return self.read_start(file, limit)

    def read_start(self, file: SourceFile, length: int) -> bytes:
        """The first bytes of `file`, by a ranged request where it is not in the cache."""
        length = min(length, file.size)
        if not self.missing((file,)):
            return read_start(file, length)
        start = bytearray(length)
        self._reader(file).read_into(0, memoryview(start))
        return bytes(start)

    def missing(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        """Those of `files` that are of this prefix and not in the cache."""
        return tuple(file for file in self._own(files) if not is_whole(file))

    def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
        """Download the missing ones, one after another, each in several pieces at once."""
        missing = self.missing(files)
        self._check_space(sum(file.size for file in missing))
        for file in missing:
            _log.info("downloading %s of %s (%s)", file.name, self.location, format_size(file.size))
            if for_now:
                mark_passing(file)
            download(file, self._reader(file).read, on_bytes, self.objects[file.name].md5)

    def open(self, file: SourceFile) -> RangeReader:
        """See Storage."""
        return self._reader(file) if self.missing((file,)) else LocalReader(file, open_file(file))

    def done(self, file: SourceFile) -> None:
        """See Storage."""
        for own in self._own((file,)):
            remove_passing(own)

    def _own(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        return tuple(file for file in files if Path(file.path).is_relative_to(self.folder))

    def _reader(self, file: SourceFile) -> ObjectReader:
        return ObjectReader(self.location, file.name, self.bucket, self.objects[file.name])

    def _check_space(self, nbytes: int) -> None:
        """Raise ResourceError unless the cache's disk can take `nbytes` more."""
        if not nbytes:
            return
        free = shutil.disk_usage(existing_folder(self.folder)).free
        if nbytes + SPARE_DISK_BYTES > free:
            raise ResourceError(
                f"the download needs {format_size(nbytes)} and the disk of the cache ({cache_root()}) has"
                f" {format_size(free)} free; free some, or set HF_HOME to a folder on another disk"
            )


@dataclass(frozen=True, slots=True)
class ObjectReader:
    """An object, read by requests: a RangeReader. `location` and `name` are for messages."""

    location: str
    name: str
    bucket: Bucket
    found: StoredObject

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See RangeReader."""
        check_range(self.name, self.found.size, start, len(buffer))
        if len(buffer):
            buffer[:] = self.read(start, len(buffer))

    def read(self, start: int, length: int) -> memoryview:
        """Bytes from `start` on, in memory of their own. Raises what `read_into` does."""
        try:
            return self.bucket.read(self.found, start, length)
        except ObjectChanged as error:
            raise CheckpointError(
                f"{self.location}: {self.name} changed while it was in use: the store has another content for it than"
                f" it listed ({self.found.size} bytes, ETag {self.found.etag}), or none; put it back, or start again"
            ) from error

    def close(self) -> None:
        """Nothing: each request is one of its own."""


def cache_root() -> Path:
    """The folder that fetched objects lie in."""
    return Path(constants.HF_ASSETS_CACHE).expanduser().resolve() / "streamconv" / "objects"


def open_objects(location: str, revision: str | None, subfolder: str | None) -> ObjectFolder:
    """The objects below `location`.

    Raises OptionError for what is no such place, StoreError, InputError where there is nothing.
    """
    found = _LOCATION.fullmatch(location)
    path = (found[3] or "").rstrip("/") if found else ""
    if found is None or (path and not is_inside(path)):
        raise OptionError(
            f"{location!r} is no place in an object store, expected s3://bucket/prefix, gs://bucket/prefix or"
            " az://container/prefix"
        )
    if revision is not None:
        raise OptionError(
            f"{location} is in an object store and has no revision {revision}; leave the revision out"
        )
    if subfolder is not None:
        check_subfolder(subfolder)
        path = f"{path}/{subfolder}" if path else subfolder
    bucket = Bucket(found[1], found[2], location)
    prefix = f"{path}/" if path else ""
    listed = {
        each.key.removeprefix(prefix): each for each in bucket.listed(path) if each.key.startswith(prefix)
    }
    folders = {name.rpartition("/")[0] for name in listed}
    objects = {
        name: each
        for name, each in listed.items()
        if is_inside(name)
        and not (name in folders and not each.size)  # a marker that consoles leave of a folder
    }
    if not objects:
        raise InputError(f"{location}: nothing is there; check the name of the bucket and the prefix")
    _log.info("%s: %d objects", location, len(objects))
    digest = hashlib.sha256(f"{bucket.identity}/{prefix}".encode()).hexdigest()[:16]
    label = _UNUSUAL.sub("-", f"{found[2]}-{path}")[-80:]
    return ObjectFolder(location, bucket, cache_root() / f"{label}-{digest}", objects)
