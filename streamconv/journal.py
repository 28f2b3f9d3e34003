"""What a run has finished, and what makes a rerun a continuation: the files in `OUT/.streamconv/`.

    lock           held (flock) while a run is alive
    plan.json      the fingerprint of the run that owns the folder
    journal.jsonl  append-only; every line is on disk before the next is written
    *.partial      shards being written; a finished one loses the suffix, still inside this folder

Two kinds of line matter. A *watermark* says: the first `offset` bytes of this shard are on disk and hash to
`sha256`; a rerun goes on from there. *finished* says the same of a whole shard. Both carry the kept-delta sums of
the weights that were completed since the line before, so that a resumed run reports the same numbers.
A torn last line, the mark of a kill while appending, is ignored: what it would have said is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.checkpoint.writer import fsync_folder, write_file
from streamconv.errors import OutputError

WORK_FOLDER = ".streamconv"


@dataclass(frozen=True, slots=True)
class Watermark:
    """The first `offset` bytes of a shard are on disk, and hash to `sha256`."""

    offset: int
    sha256: str


@dataclass(slots=True)
class Progress:
    """What the journal says is done. `sums` are kept-delta sums by weight name."""

    finished: dict[str, str] = field(default_factory=dict)  # shard name -> sha256
    watermarks: dict[str, Watermark] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)
    publishing: bool = False
    rejected: bool = False


class Journal:
    """The work folder of one output, opened for one run. Use as a context manager: it holds the lock."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
        self.folder = out / WORK_FOLDER
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.resume = resume
        self.progress = Progress()
        self._lock: int | None = None
        self._lines: int | None = None

    def __enter__(self) -> Journal:
        _make_folder(self.folder)
        self._take_lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in (self._lines, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._lines = self._lock = None

    def partial(self, shard: str) -> Path:
        """Where a shard is written before it is whole."""
        return self.folder / f"{shard}.partial"

    def finished(self, shard: str) -> Path:
        """Where a whole shard waits for publication."""
        return self.folder / shard

    def watermark(self, shard: str, mark: Watermark, sums: Mapping[str, list[float]]) -> None:
        self._append({"watermark": shard, "offset": mark.offset, "sha256": mark.sha256, "sums": dict(sums)})

    def finish(self, shard: str, sha256: str, sums: Mapping[str, list[float]]) -> None:
        self._append({"finished": shard, "sha256": sha256, "sums": dict(sums)})

    def publish(self) -> None:
        """Record that from here on files appear under their final names."""
        if not self.progress.publishing:
            self._append({"publishing": True})

    def reject(self) -> None:
        """Record that the result was refused for its quality: another run may discard it without asking."""
        self._append({"rejected": True})

    def restart(self, shard: str) -> None:
        """Forget the watermark of a shard whose bytes turned out not to match it."""
        self._append({"restart": shard})

    def remove(self) -> None:
        """Delete the work folder; the output is complete."""
        self.close()
        shutil.rmtree(self.folder)
        fsync_folder(self.folder.parent)

    def _take_lock(self) -> None:
        path = self.folder / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            self.close()
            raise OutputError(
                f"{self.folder.parent} is in use by another run ({holder}); wait for it, or choose another --out"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _open(self) -> None:
        plan, lines = self.folder / "plan.json", self.folder / "journal.jsonl"
        if plan.exists() and self.resume and self._is_same_run(plan, lines):
            self.progress = _read_progress(lines)
        else:
            self._clear()
            write_file(plan, json.dumps(self.fingerprint, indent=1, sort_keys=True).encode())
        self._lines = os.open(lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        fsync_folder(self.folder)

    def _is_same_run(self, plan: Path, lines: Path) -> bool:
        """Whether the folder's run is this one. Raises OutputError if it is another that someone may want."""
        try:
            found = json.loads(plan.read_bytes())
        except ValueError:
            found = {}
        differing = _differences(found, self.fingerprint)
        if differing and not _read_progress(lines).rejected:
            raise OutputError(
                f"{self.folder.parent} holds an unfinished run with other inputs or options "
                f"({'; '.join(differing[:3])}); repeat that command to finish it, pass --no-resume to discard it, "
                "or choose another --out"
            )
        return not differing

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._lines is not None
        os.write(self._lines, (json.dumps(record) + "\n").encode())
        os.fdatasync(self._lines)
        _replay(self.progress, record)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {folder}: {error.strerror}; choose another --out"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {folder}; check its permissions, or choose another --out")


def _read_progress(lines: Path) -> Progress:
    progress = Progress()
    if not lines.exists():
        return progress
    content = lines.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with lines.open("r+b") as file:  # cut the torn line off, or the next one would be glued to it
            file.truncate(whole)
    for line in content[:whole].splitlines():
        _replay(progress, json.loads(line))
    return progress


def _replay(progress: Progress, record: Mapping[str, Any]) -> None:
    progress.sums.update(record.get("sums", {}))
    if "watermark" in record:
        progress.watermarks[record["watermark"]] = Watermark(record["offset"], record["sha256"])
    elif "finished" in record:
        progress.finished[record["finished"]] = record["sha256"]
    elif "restart" in record:
        progress.watermarks.pop(record["restart"], None)
        progress.finished.pop(record["restart"], None)
    elif "publishing" in record:
        progress.publishing = True
    elif "rejected" in record:
        progress.rejected = True


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two fingerprints differ, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [
            _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
            for key in sorted({*found, *wanted})
        ]
        return [text for part in parts for text in part]
    return [] if found == wanted else [f"{path}: then {_short(found)}, now {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
