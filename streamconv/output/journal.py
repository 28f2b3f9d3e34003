"""Journal of a run: finished work, and what makes a rerun a continuation; the files in `OUT/.streamconv/`.

    lock           held (flock) while a run is alive
    plan.json      the fingerprint of the run that owns the folder
    journal.jsonl  append-only; every line is on disk before the next is written
    *.partial      shards being written; a finished one loses the suffix, still inside this folder
    <pass>/        a folder for each pass of the plan (`Pass.folder`), with what it has made: `calibration`, `rescaling`

Two kinds of line matter. A *watermark* says: the first `offset` bytes of this shard are on disk and hash to
`sha256`; a rerun goes on from there. *finished* says the same of a whole shard. Both carry the kept-delta sums of
the weights that were completed since the line before, so that a resumed run reports the same numbers.
A torn last line, the mark of a kill while appending, is ignored: what it would have said is done again.

The folder belongs to the run that plan.json names. Without that file, what lies in it is left over and goes: so it
is written first and deleted first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.checkpoint.writer import fsync_folder, write_error, write_file
from streamconv.errors import OutputError

WORK_FOLDER = ".streamconv"
_PLAN, _LINES, _LOCK = "plan.json", "journal.jsonl", "lock"


@dataclass(frozen=True, slots=True)
class Watermark:
    """The first `offset` bytes of a shard are on disk, and hash to `sha256`."""

    offset: int
    sha256: str


@dataclass(slots=True)
class Progress:
    """Progress that the journal records. `sums` are kept-delta sums by weight name."""

    finished: dict[str, str] = field(default_factory=dict)  # shard name -> sha256
    watermarks: dict[str, Watermark] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)
    publishing: bool = False
    rejected: bool = False

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a run of other inputs or options must not discard it without being told to."""
        return bool(self.finished or self.watermarks or self.publishing) and not self.rejected


def is_publishing(out: Path) -> bool:
    """Whether an unfinished run had begun to put files under their final names."""
    folder = out / WORK_FOLDER
    return (folder / _PLAN).exists() and _read_progress(folder / _LINES).publishing


def is_owned(out: Path) -> bool:
    """Whether `out` has a work folder that belongs to an unfinished run."""
    return (out / WORK_FOLDER / _PLAN).exists()


def lock_holder(out: Path) -> str | None:
    """Process that is at work on the output at this moment, in the words of its lock; None if there is none.

    Looking takes the lock for an instant, which `Journal.lock` waits for.
    """
    if not is_owned(out):
        return None
    try:
        lock = os.open(out / WORK_FOLDER / _LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 200, 0).decode(errors="replace").strip()
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(lock)
    return None


def remove_leftovers(out: Path) -> None:
    """Delete the work folder of a run that was killed when there was nothing left to do but that."""
    if not (out / WORK_FOLDER).exists():
        return
    journal = Journal(out, {}, resume=True)
    with contextlib.suppress(OutputError):  # another run is beginning: it will clear up
        journal.lock()
        if not is_owned(out):
            journal.remove()
    journal.close()


class Journal:
    """The work folder of one output, opened for one run. Use as a context manager: it holds the lock."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
        self.folder = out / WORK_FOLDER
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.resume = resume
        self.progress = Progress()
        self._lock: int | None = None
        self._lines: int | None = None
        self._appending = threading.Lock()  # shards may be written side by side

    def __enter__(self) -> Journal:
        self.lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._close_lines()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close_lines(self) -> None:
        if self._lines is not None:
            os.close(self._lines)
            self._lines = None

    @property
    def has_passed(self) -> bool:
        """Whether a pass of any plan, be it another one's than this run's, has left a whole file."""
        return any(self.folder.glob("*/*.safetensors"))

    def partial(self, shard: str) -> Path:
        """Path of a shard before it is whole."""
        return self.folder / f"{shard}.partial"

    def finished(self, shard: str) -> Path:
        """Path at which a whole shard waits for publication."""
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
        """Delete the work folder; the output is complete. Holds the lock for as long as there is anything in it."""
        with _typed_errors(self.folder):
            self._close_lines()  # NFS keeps what is deleted open
            self._clear()
            (self.folder / _LOCK).unlink()
        self.close()
        with contextlib.suppress(OSError):  # another run may have moved in by now
            self.folder.rmdir()
        fsync_folder(self.folder.parent)

    def lock(self) -> None:
        """Make the folder and take its lock. Raises OutputError if another run has it."""
        path = self.folder / _LOCK
        while self._lock is None:
            make_folder(self.folder)
            try:
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # a run that ended has removed the folder just now
            except OSError as error:
                raise write_error(error, path) from error
            self._lock_descriptor(self._lock)
            if not _is_still_at(path, self._lock):  # likewise: what is locked is in no folder any more
                os.close(self._lock)
                self._lock = None

    def _lock_descriptor(self, lock: int) -> None:
        path = self.folder / _LOCK
        try:
            _lock_patiently(lock)
        except BlockingIOError as error:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
            self.close()
            raise OutputError(
                f"{self.folder.parent} is in use by another run ({holder}); wait for it, or choose another --out"
            ) from error
        except OSError as error:
            self.close()
            raise OutputError(
                f"{path} cannot be locked: {error.strerror}; choose an --out on a file system that has locks"
            ) from error
        with contextlib.suppress(OSError):  # who holds it, for others' messages: no more than that
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _open(self) -> None:
        plan, lines = self.folder / _PLAN, self.folder / _LINES
        with _typed_errors(lines):
            if plan.exists() and self.resume and self._is_same_run(plan, lines):
                self.progress = _read_progress(lines)
                _cut_torn_line(lines)
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
        progress = _read_progress(lines)
        if differing and (progress.is_worth_keeping or (self.has_passed and not progress.rejected)):
            raise OutputError(
                f"{self.folder.parent} holds an unfinished run with other inputs or options "
                f"({'; '.join(differing[:3])}); repeat that command to finish it, pass --no-resume to discard it, "
                "or choose another --out"
            )
        return not differing

    def _clear(self) -> None:
        """Delete everything but the lock."""
        (self.folder / _PLAN).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._lines is not None
        line = (json.dumps(record) + "\n").encode()
        with self._appending, _typed_errors(self.folder / _LINES):
            while line:
                line = line[os.write(self._lines, line) :]
            os.fsync(self._lines)
            _replay(self.progress, record)


@contextlib.contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


def _lock_patiently(lock: int) -> None:
    """Take a lock, also where `lock_holder` has it for an instant. Raises OSError as flock(2) does."""
    for pause_s in (0.01, 0.05):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause_s)
        else:
            return
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {folder}: {error.strerror}; choose another --out"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {folder}; check its permissions, or choose another --out")


def _records(lines: Path) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every record that is whole, and where it ends. The rest of the file is as if it had never been written."""
    end = 0
    for line in lines.read_bytes().splitlines(keepends=True) if lines.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            return
        end += len(line)
        yield record, end


def _read_progress(lines: Path) -> Progress:
    progress = Progress()
    for record, _ in _records(lines):
        _replay(progress, record)
    return progress


def _cut_torn_line(lines: Path) -> None:
    """Cut off a last line that was not written whole, or the next one would be glued to it."""
    whole = max((end for _, end in _records(lines)), default=0)
    if lines.exists() and whole < lines.stat().st_size:
        os.truncate(lines, whole)


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
        progress.publishing, progress.rejected = True, False
    elif "rejected" in record:
        progress.rejected = True


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Differences of two fingerprints, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [
            _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
            for key in sorted({*found, *wanted})
        ]
        return [text for part in parts for text in part]
    return [] if found == wanted else [f"{path}: then {_short(found)}, now {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."  # a Hub id with its commit is shown whole
