"""A finished output against its manifest, and against the maths.

`verify_output` rereads every shard: sizes, hashes, headers, index. `verify_exactly` computes the merge anew from
base and adapter, through the very code that wrote it, and compares byte by byte as it goes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.checkpoint.container import stored_files
from streamconv.checkpoint.strict_json import some
from streamconv.errors import CheckpointError, InputError, StreamconvError, VerificationError
from streamconv.output.listing import Entry, Listing, read_listing
from streamconv.output.manifest import MANIFEST
from streamconv.output.published import (
    CHUNK_BYTES,
    EDITED_BYTES,
    Strangers,
    files_beside,
    lacks_form,
    read_chunks,
    sha256_of,
)
from streamconv.output.sidecars import RESIDUAL
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.progress import OnBytes, StopRequest
from streamconv.running.cell import KeptDelta
from streamconv.running.executor import run_plans
from streamconv.running.sink import Output
from streamconv.storage.base import SourceFile, Storage
from streamconv.storage.local import close_quietly, open_folder, reading
from streamconv.system_errors import NO_FILE, lacking, was_refused

_CHANGED, _REMOVED = "changed", "removed"
_SINCE = "{}: the weights are as they were written, but {}; restore it if that was not meant"


@dataclass(frozen=True, slots=True)
class Verified:
    """Extent of a check: number of shards, tensors and bytes; `exact` if the maths was done again, for every byte.

    Without their text, so many `calibrated` weights were not made again, but decoded and compared with their targets.
    Of files that people may edit, `edited` are changed since, `removed` are gone, `added` were not there. `others` are
    weights and code beside the output that are none of it, and that loaders leave alone.
    """

    shards: int
    tensors: int
    bytes: int
    exact: bool
    calibrated: int = 0
    edited: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


Sight = Mapping[str, SourceFile | None]
"""Files of an output as they were at one moment, by name."""


def read_manifest(storage: Storage, name: str) -> Mapping[str, Any]:
    """Content of an output's manifest. Raises InputError where there is none, VerificationError as `read_listing`."""
    return read_listing(storage, name).content


def verify_layout(out: Path, plan: Plan) -> None:
    """Right after a run: every shard is in place with its size, and opens as the plan has it.

    Bytes are not reread; they were hashed on their way to the disk.
    """
    storage = open_folder(str(out))
    for shard in plan.shards:
        path = out / shard.name
        found = storage.file(shard.name).size
        if found != shard.size:
            raise VerificationError(
                f"{path} has {found} bytes, expected {shard.size}; do not use this output"
            )
    stored, planned = stored_files(storage, [shard.name for shard in plan.shards]).tensors, plan.tensors
    if stored != planned:
        name = min(name for name in {*stored, *planned} if stored.get(name) != planned.get(name))
        raise VerificationError(f"{out}: tensor {name} is not stored as planned; do not use this output")


def verify_output(storage: Storage, listing: Listing, on_bytes: OnBytes) -> Verified:
    """Reread every file of an output and compare with its manifest; shards with the index, too.

    Files that people may edit may differ, which is told, unless they do not have their form any more. Raises
    VerificationError where another differs, or where a loader would take a file that is none of the output.
    """
    where = storage.location
    try:
        total = sum(_check_shard(storage, name, entry, on_bytes) for name, entry in listing.shards.items())
        stored = stored_files(storage, listing.shards)
    except InputError as error:
        if was_refused(error):  # by the disk, say, whatever the files hold
            raise
        raise VerificationError(f"{error}; do not use this output") from error
    strange = stored.names ^ set(listing.shards)
    if strange:
        raise VerificationError(
            f"{where}: {min(strange)} is in only one of index and {MANIFEST}; do not use this output"
        )
    for name, entry in listing.files.items():
        if state := _state(storage, name, entry, on_bytes):
            raise VerificationError(_SINCE.format(where, f"{name} was {state} since"))
    states = {
        name: state
        for name, entry in listing.editable.items()
        if (state := _state(storage, name, entry, on_bytes))
    }
    beside = _beside(storage, listing)
    return Verified(
        len(listing.shards),
        len(stored.tensors),
        total,
        exact=False,
        edited=tuple(name for name, state in states.items() if state == _CHANGED),
        removed=tuple(name for name, state in states.items() if state == _REMOVED),
        added=beside.added,
        others=beside.others,
    )


def _beside(storage: Storage, listing: Listing) -> Strangers:
    """Files beside the output. Raises VerificationError for one that a loader would take."""
    if not listing.is_complete:  # which files are the output's is not known
        return Strangers((), (), ())
    folders = (None, RESIDUAL, CHAT_TEMPLATES)
    names = {name for folder in folders for name in storage.names(folder) if not name.startswith(".")}
    found = files_beside(names, {*listing.all, MANIFEST})
    if found.taken:
        raise VerificationError(
            f"{storage.location}: {some(found.taken)} is not of this output, and loaders would take it instead of the "
            "output's own files, or on top of them; move it elsewhere"
        )
    return found


def _state(storage: Storage, name: str, entry: Entry, on_bytes: OnBytes) -> str | None:
    """Whether a file was changed or removed since; None if not.

    Raises VerificationError for one that is damaged, CheckpointError where a pipe, say, has its name.
    """
    try:
        file = storage.file(name)
        if file.size == entry.size and sha256_of(file, on_bytes) == entry.sha256:
            return None
        reason = None if entry.form is None else _lacks_form(file, entry.form)
    except CheckpointError:
        if _is_missing(storage, name):
            return _REMOVED
        raise
    if reason:
        raise VerificationError(_SINCE.format(storage.location, f"{name} was damaged since: {reason}"))
    return _CHANGED


def _lacks_form(file: SourceFile, form: str) -> str | None:
    if file.size > EDITED_BYTES:
        return f"it has {file.size} bytes, more than such a file has"
    return lacks_form(b"".join(map(bytes, read_chunks(file))), form)


def _is_missing(storage: Storage, name: str) -> bool:
    """Whether nothing has that name: no folder, no pipe, no link."""
    folder = name.rpartition("/")[0] or None
    return name not in (*storage.names(folder), *(() if folder else storage.folders()))


def _check_shard(storage: Storage, name: str, entry: Entry, on_bytes: OnBytes) -> int:
    """Bytes of the shard. Raises VerificationError unless it has its size and hash, CheckpointError as `file` does."""
    file = storage.file(name)
    if file.size != entry.size:
        raise VerificationError(
            f"{storage.location}: {name} has {file.size} bytes, expected {entry.size}; do not use this output"
        )
    digest = sha256_of(file, on_bytes)
    if digest != entry.sha256:
        raise VerificationError(
            f"{storage.location}: {name} hashes to {digest}, expected {entry.sha256}; do not use this output"
        )
    return entry.size


def look(storage: Storage, listing: Listing) -> Sight:
    """Files as they are at this moment, by name: size, and the time of the last change; None for one that is none."""
    return {name: _seen(storage, name) for name in (MANIFEST, *listing.all)}


def _seen(storage: Storage, name: str) -> SourceFile | None:
    try:
        return storage.file(name)
    except CheckpointError:
        return None


def hash_file(path: str, on_bytes: OnBytes) -> str:
    """SHA-256 of a file in hexadecimal; `on_bytes` is told how many bytes were read.

    Raises CheckpointError for what is no regular file or cannot be read.
    """
    with reading(path):
        found = Path(path).stat()
    return sha256_of(SourceFile(path, path, found.st_size, f"mtime:{found.st_mtime_ns}"), on_bytes)


class ComparingSink:
    """Takes the bytes of a plan and compares them with the files of an output, raising VerificationError."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._shard: ShardPlan | None = None
        self._descriptor: int | None = None
        self._offset = 0

    def begin(self, shard: ShardPlan) -> None:
        self._shard, self._offset = shard, 0
        path = self._out / shard.name
        try:
            # A pipe in the place of the file would wait for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self._descriptor)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise VerificationError(f"{path} must be a regular file; do not use this output")
        if found.st_size != shard.size:
            raise VerificationError(
                f"{path} has {found.st_size} bytes, expected {shard.size}; do not use this output"
            )
        if self._read(len(shard.header)) != shard.header:
            raise VerificationError(f"{path}: its header is not as planned; do not use this output")
        self._offset = len(shard.header)

    def write(self, data: memoryview, release: Callable[[], None]) -> None:
        assert self._shard is not None
        if self._offset + len(data) > self._shard.size:
            raise VerificationError(
                f"{self._out / self._shard.name}: {self._offset + len(data)} bytes were computed, and it was planned "
                f"with {self._shard.size}"
            )
        for start in range(0, len(data), CHUNK_BYTES):
            wanted = data[start : start + CHUNK_BYTES]
            if self._read(len(wanted)) != wanted:
                raise VerificationError(
                    f"{self._out}: tensor {self._tensor()} differs from what base, adapter and options give; "
                    "do not use this output"
                )
            self._offset += len(wanted)
        release()

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        del sums

    def end(self) -> None:
        assert self._shard is not None
        if self._offset != self._shard.size:
            raise VerificationError(
                f"{self._out / self._shard.name}: only {self._offset} bytes were computed, and it was planned with "
                f"{self._shard.size}"
            )
        self.close()

    def halt(self) -> None:
        self.close()

    def drain(self) -> None:
        pass

    def close(self) -> None:
        if self._descriptor is not None:
            close_quietly(self._descriptor)
            self._descriptor = None

    def _read(self, length: int) -> bytes:
        assert self._descriptor is not None
        assert self._shard is not None
        try:
            return os.pread(self._descriptor, length, self._offset)
        except OSError as error:
            raise _unreadable(self._out / self._shard.name, error) from error

    def _tensor(self) -> str:
        """The tensor at the present offset, or the last one."""
        assert self._shard is not None
        name = ""
        for placed in self._shard.steps:
            end = placed.offset
            for spec in placed.step.specs:
                end, name = end + spec.nbytes, spec.name
                if self._offset < end:
                    return name
        return name


def _unreadable(path: Path, error: OSError) -> StreamconvError:
    """The error for a file that is not there, or something else, and for one that the system does not give."""
    if error.errno in NO_FILE:
        return VerificationError(f"{path} cannot be read: {error.strerror}; do not use this output")
    return lacking(error) or CheckpointError(f"{path} cannot be read: {error.strerror}")


def verify_exactly(out: Path, plan: Plan, on_bytes: OnBytes, stop: StopRequest) -> None:
    """Compute the whole plan again and compare with the files. Raises VerificationError at the first difference."""
    starts = {shard.name: len(shard.header) for shard in plan.shards}
    run_plans([Output(plan, starts, lambda: ComparingSink(out))], on_bytes, stop)
