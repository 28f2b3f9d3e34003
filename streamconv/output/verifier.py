"""A finished output against its manifest, and against the maths.

`verify_output` rereads every shard: sizes, hashes, headers, index. `verify_exactly` computes the merge anew from
base and adapter, through the very code that wrote it, and compares byte by byte as it goes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.strict_json import parse_object
from streamconv.errors import InputError, VerificationError
from streamconv.output.sidecars import RESIDUAL
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.progress import OnBytes, StopRequest
from streamconv.running.cells import KeptDelta
from streamconv.running.executor import run_plans
from streamconv.running.sink import Output
from streamconv.storage.base import Storage
from streamconv.storage.local import open_folder

_MAX_MANIFEST_BYTES = 64 * 2**20
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Verified:
    """Extent of a check: number of shards, tensors and bytes; `exact` if the maths was done again, for every byte.

    Without their text, so many `calibrated` weights were not made again, but decoded and compared with their targets.
    """

    shards: int
    tensors: int
    bytes: int
    exact: bool
    calibrated: int = 0


def read_manifest(storage: Storage, name: str) -> Mapping[str, Any]:
    """The manifest of an output. Raises InputError where there is none."""
    if name not in storage.names():
        raise InputError(f"{storage.location} has no {name}, so it is no finished output of streamconv")
    return parse_object(storage.read_bytes(name, _MAX_MANIFEST_BYTES), f"{storage.location}: {name}")


def verify_layout(out: Path, plan: Plan) -> None:
    """Right after a run: every shard is in place with its size, and opens as the plan has it.

    Bytes are not reread; they were hashed on their way to the disk.
    """
    index = read_index(open_folder(str(out)))
    for shard in plan.shards:
        path = out / shard.name
        found = path.stat().st_size
        if found != shard.size:
            raise VerificationError(
                f"{path} has {found} bytes, expected {shard.size}; do not use this output"
            )
    planned = {
        spec.name: spec for shard in plan.shards for placed in shard.steps for spec in placed.step.specs
    }
    stored = {name: tensor.spec for name, tensor in index.tensors.items()}
    if stored != planned:
        name = min(name for name in {*stored, *planned} if stored.get(name) != planned.get(name))
        raise VerificationError(f"{out}: tensor {name} is not stored as planned; do not use this output")


def verify_output(location: str, manifest_name: str, on_bytes: OnBytes) -> Verified:
    """Reread every shard of an output, its index, config.json and recipe, and compare with its manifest.

    Other files beside the weights may be edited freely. Raises VerificationError where something differs,
    InputError where there is no manifest.
    """
    storage = open_folder(location)
    content = read_manifest(storage, manifest_name)
    shards = _listed(content, "shards", f"{location}: {manifest_name}")
    files = _listed(content, "files", f"{location}: {manifest_name}")
    try:
        total = sum(_check_file(storage, name, *listed, on_bytes) for name, listed in shards.items())
        index = read_index(storage)
    except InputError as error:
        raise VerificationError(f"{error}; do not use this output") from error
    strange = {shard.file.name for shard in index.shards} ^ set(shards)
    if strange:
        raise VerificationError(
            f"{location}: {min(strange)} is in only one of index and {manifest_name}; do not use this output"
        )
    there = (*storage.names(), *storage.names(RESIDUAL))
    for name, (_, sha256) in files.items():
        if name not in there or hash_file(storage.file(name).path, lambda _: None) != sha256:
            done = "changed" if name in there else "removed"
            raise VerificationError(
                f"{location}: the weights are as they were written, but {name} was {done} since; "
                "restore it if that was not meant"
            )
    return Verified(len(shards), len(index.tensors), total, exact=False)


def _listed(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, tuple[int, str]]:
    """Size and SHA-256 by file name, as the manifest lists them under `key`."""
    found = content.get(key)
    try:
        if not isinstance(found, dict) or not found:
            raise TypeError
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in found.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(
            f"{where} must list {key} with size and sha256; it is damaged, do not use this output"
        ) from error


def _check_file(storage: Storage, name: str, size: int, sha256: str, on_bytes: OnBytes) -> int:
    """Bytes of the file. Raises VerificationError unless it has that size and hash."""
    file = storage.file(name)
    if file.size != size:
        raise VerificationError(
            f"{storage.location}: {name} has {file.size} bytes, expected {size}; do not use this output"
        )
    digest = hash_file(file.path, on_bytes)
    if digest != sha256:
        raise VerificationError(
            f"{storage.location}: {name} hashes to {digest}, expected {sha256}; do not use this output"
        )
    return size


def hash_file(path: str, on_bytes: OnBytes) -> str:
    """SHA-256 of a file in hexadecimal; `on_bytes` is told how many bytes were read."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            on_bytes(count)
    return digest.hexdigest()


class ComparingSink:
    """Takes the bytes of a plan and compares them with the files of an output."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._shard: ShardPlan | None = None
        self._descriptor: int | None = None
        self._offset = 0

    def begin(self, shard: ShardPlan) -> None:
        self._shard = shard
        self._descriptor = os.open(self._out / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        found = os.pread(self._descriptor, len(shard.header), 0)
        if found != shard.header:
            raise VerificationError(
                f"{self._out / shard.name}: its header is not as planned; do not use this output"
            )
        self._offset = len(shard.header)

    def write(self, data: memoryview, release: Callable[[], None]) -> None:
        assert self._descriptor is not None
        for start in range(0, len(data), _CHUNK_BYTES):
            wanted = data[start : start + _CHUNK_BYTES]
            if os.pread(self._descriptor, len(wanted), self._offset) != wanted:
                raise VerificationError(
                    f"{self._out}: tensor {self._tensor()} differs from what base, adapter and options give; "
                    "do not use this output"
                )
            self._offset += len(wanted)
        release()

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        del sums

    def end(self) -> None:
        self.close()

    def halt(self) -> None:
        self.close()

    def drain(self) -> None:
        pass

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _tensor(self) -> str:
        """The tensor at the present offset."""
        assert self._shard is not None
        for placed in self._shard.steps:
            end = placed.offset
            for spec in placed.step.specs:
                end += spec.nbytes
                if self._offset < end:
                    return spec.name
        raise AssertionError(f"{self._shard.name} has no tensor at {self._offset}")


def verify_exactly(out: Path, plan: Plan, on_bytes: OnBytes, stop: StopRequest) -> None:
    """Compute the whole plan again and compare with the files. Raises VerificationError at the first difference."""
    starts = {shard.name: len(shard.header) for shard in plan.shards}
    run_plans([Output(plan, starts, lambda: ComparingSink(out))], on_bytes, stop)
