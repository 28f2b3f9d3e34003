"""Journal of a run: finished work, and what makes a rerun a continuation; the files in `OUT/.streamconv/`.

    lock           held (flock) while a run is alive; names it by process, host and a number of its own
    plan.json      the fingerprint of the run that owns the folder
    journal.jsonl  append-only; every line is on disk before the next is written (see journal_lines.py)
    publishing     empty; says that files under final names are of a run that did not end, also to another that takes
                   the folder over
    *.partial      shards being written; a finished one loses the suffix, still inside this folder; and small files
                   before they are put in place
    <pass>/        a folder for each pass of the plan (`Pass.folder`), with what it has made: `calibration`, `rescaling`
    part-K-of-N/   of a worker that makes a part of the output: the same files again, of its shards (see parts.py)

Two kinds of line matter. A *watermark* says: the first `offset` bytes of this shard are on disk and hash to
`sha256`; a rerun goes on from there. *finished* says the same of a whole shard. Both carry the kept-delta sums of
the weights that were completed since the line before, so that a resumed run reports the same numbers.
A torn last line, the mark of a kill while appending, is ignored: what it would have said is done again.

The folder belongs to the run that plan.json names. Without that file, what a run has left in it goes: so it is written
first and deleted first. What no run can have put there is never touched (see work_folder.py).

Locks may lock nothing, as between two hosts that mount a file system with locks of their own. So a run looks whether
`lock` still names it before whatever it adds to the journal or puts in place, and stops once it does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamconv.checkpoint.own_files import (
    FileIdentity,
    Sighting,
    check_kind,
    kind_at,
    known_again,
    open_own,
    read_error,
    read_own,
)
from streamconv.checkpoint.strict_json import parse_object
from streamconv.checkpoint.writer import close_written, fsync_folder, write_error, write_file
from streamconv.errors import CheckpointError, OutputError
from streamconv.escapes import one_line
from streamconv.output.journal_lines import (
    Progress,
    Recorded,
    Watermark,
    encode_line,
    fingerprint_digest,
    read_lines,
)
from streamconv.output.work_folder import (
    LINES,
    LOCK,
    PLAN,
    PUBLISHING,
    WORK_FOLDER,
    check_entries,
    check_ours_alone,
    has_whole_files,
    is_there,
    note_of,
    part_folders,
    remove_entries,
)
from streamconv.storage.local import FOLDER, close_quietly
from streamconv.system_errors import lacking

__all__ = [
    "WORK_FOLDER",
    "Journal",
    "Progress",
    "Watermark",
    "is_owned",
    "is_publishing",
    "lock_holder",
    "make_folder",
    "make_pass_folder",
    "part_at_work",
    "remove_leftovers",
]

_MAX_PLAN_BYTES = 256 * 2**20
_MAX_OWNER_BYTES = 4096


def is_publishing(out: Path) -> bool:
    """Whether an unfinished run had begun to put files under their final names."""
    folder = out / WORK_FOLDER
    if not is_there(folder, PLAN):
        return False
    if is_there(folder, PUBLISHING):
        return True
    plan = _read_plan(folder / PLAN)
    return plan is not None and read_lines(folder / LINES, fingerprint_digest(plan)).progress.publishing


def is_owned(out: Path) -> bool:
    """Whether `out` has a work folder that belongs to an unfinished run."""
    return is_there(out / WORK_FOLDER, PLAN)


def lock_holder(out: Path) -> str | None:
    """Process that is at work on the output, or a part of it, at this moment, in the words of its lock; None if there
    is none.

    Looking takes the lock for an instant, which `Journal.lock` waits for.
    """
    if not is_owned(out):
        return None
    return _holder_at(out / WORK_FOLDER) or part_at_work(out / WORK_FOLDER)


def part_at_work(folder: Path, but: str = "") -> str | None:
    """Process that is at work on a part, in the words of its lock; None if there is none.

    `folder` is the work folder of the whole, `but` the name of a part's folder that is not looked at.
    """
    held = (_holder_at(each) for each in part_folders(folder) if each.name != but)
    return next((holder for holder in held if holder is not None), None)


def _holder_at(folder: Path) -> str | None:
    """Process that holds the lock of a work folder, in the words of the lock; None if there is none."""
    try:
        lock = open_own(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(error, folder / LOCK) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(lock)
    except OSError:  # a file system without locks
        return None
    finally:
        close_quietly(lock)
    return None


def remove_leftovers(out: Path) -> None:
    """Delete the work folder of a run that was killed when there was nothing left to do but that."""
    journal = Journal(out, {}, resume=True)
    with contextlib.suppress(
        OutputError
    ):  # another run is beginning: it will clear up; or it is somebody else's
        if kind_at(journal.folder) is None:
            return
        journal.lock()
        if not is_owned(out):
            journal.remove()
    journal.close()


class Journal:
    """The work folder of one output, or of a part of it, opened for one run. Use as a context manager: it holds the
    lock.

    `part` is the name of a part's folder in that of the whole, `worker` what the lock says of this process beside its
    number. `identities` are those of finished shards, by name, as this run has written or read them; `sightings` tell
    of those that parts have made, as their workers saw them; `placed` are identities of all that it has put in place.
    """

    def __init__(
        self, out: Path, fingerprint: Mapping[str, Any], resume: bool, part: str = "", worker: str = ""
    ) -> None:
        self.out, self.part, self.worker = out, part, worker
        self.folder = out / WORK_FOLDER / part
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.resume = resume
        self.progress = Progress()
        self.identities: dict[str, FileIdentity] = {}
        self.sightings: dict[str, Sighting] = {}
        self.placed: dict[Path, FileIdentity] = {}
        self._lock: int | None = None
        self._lines: int | None = None
        self._owner: bytes | None = None
        self._check = fingerprint_digest(self.fingerprint)  # of the last line
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
        """Close what is open; the lock is free then. All that was to last is on the disk already."""
        lines, self._lines = self._lines, None
        lock, self._lock = self._lock, None
        for descriptor in (lines, lock):
            if descriptor is not None:
                close_quietly(descriptor)

    @property
    def has_passed(self) -> bool:
        """Whether a pass of any plan, be it another one's than this run's, has left a whole file."""
        return has_whole_files(self.folder)

    @property
    def is_publishing(self) -> bool:
        """Whether this run, or one that it took over from, had begun to put files under their final names."""
        return self.progress.publishing or is_there(self.folder, PUBLISHING)

    def partial(self, shard: str) -> Path:
        """Path of a shard before it is whole."""
        return self.folder / f"{shard}.partial"

    def finished(self, shard: str) -> Path:
        """Path at which a whole shard waits for publication."""
        return self.folder / shard

    def watermark(self, shard: str, mark: Watermark, sums: Mapping[str, list[float]]) -> None:
        self._append({"watermark": shard, "offset": mark.offset, "sha256": mark.sha256, "sums": dict(sums)})

    def finish(self, shard: str, sha256: str, sums: Mapping[str, list[float]]) -> None:
        if self.part:  # whoever puts the whole together need not read this file again
            seen = self.identities[shard]
            facts = {"inode": seen.inode, "size": seen.size, "modified_ns": seen.modified_ns}
            self._append({"identity": shard, **facts})
        self._append({"finished": shard, "sha256": sha256, "sums": dict(sums)})

    def publish(self) -> None:
        """Record that from here on files appear under their final names."""
        self.check_owner()
        if not self.progress.publishing:
            self._append({"publishing": True})
        note = self.folder / PUBLISHING
        if kind_at(note) is None:  # beside the journal, whose lines are lost behind one that is damaged
            with _typed_errors(note):
                os.close(open_own(note, os.O_WRONLY | os.O_CREAT))
            fsync_folder(self.folder)

    def reject(self) -> None:
        """Record that the result was refused for its quality: another run may discard it without asking."""
        self._append({"rejected": True})

    def restart(self, shard: str) -> None:
        """Forget the watermark of a shard whose bytes turned out not to match it."""
        self._append({"restart": shard})

    def check_owner(self) -> None:
        """Raise OutputError if the work folder is not this run's any more: it is then not touched again."""
        if self._owner is None or (found := self._found_owner()) == self._owner:
            return
        if found is None:
            raise OutputError(
                f"{self.folder} was removed or emptied while this run was at work in it, and what it held cannot be"
                " put in place; run the same command again, with nothing else at work there"
            )
        raise OutputError(
            f"another run ({_first_line(found)}) took over {self.out} while this one was at work, so the file"
            " system's locks hold nobody off; this run has stopped and left everything to that one: wait for it, or"
            " choose another --out"
        )

    def _found_owner(self) -> bytes | None:
        return read_own(self.folder / LOCK, _MAX_OWNER_BYTES)

    def check_finished(self, shard: str, path: Path) -> None:
        """Raise OutputError unless `path` is the finished shard, as this run has written or read it."""
        found = known_again(path, self.identities[shard])
        if found is None:
            raise OutputError(
                f"{path} was removed or changed since it was finished; run the same command again, with nothing else at"
                " work there: it makes this shard anew"
            )
        self.identities[shard] = found

    def remove(self) -> None:
        """Delete the work folder; the output is complete. Holds the lock for as long as there is anything in it.

        What no run can have put there stays, and the folder with it.
        """
        self.check_owner()
        with _typed_errors(self.folder):
            self._close_lines()  # NFS keeps what is deleted open
            check_kind(self.folder, FOLDER)
            remove_entries(self.folder, keep=frozenset({LOCK}))
            (self.folder / LOCK).unlink(missing_ok=True)
        self.close()
        with contextlib.suppress(OSError):  # another run may have moved in by now
            self.folder.rmdir()
        fsync_folder(self.folder.parent)

    def _close_lines(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            close_written(lines, self.folder / LINES)

    def lock(self) -> None:
        """Make the folder and take its lock. Raises OutputError if another run has it, or it is no run's."""
        if (holder := self.try_lock()) is not None:
            what = f"{self.worker} of {self.out}" if self.part else f"{self.out}"
            raise OutputError(
                f"{what} is in use by another run ({holder}); wait for it, or choose another --out"
            )

    def try_lock(self) -> str | None:
        """Make the folder and take its lock; where another run has it, return what the lock says of that.

        Raises OutputError where the folder is no run's.
        """
        path = self.folder / LOCK
        while self._lock is None:
            make_folder(self.folder)
            check_entries(self.folder)
            try:
                self._lock = open_own(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                continue  # a run that ended has removed the folder just now
            except OSError as error:
                raise write_error(error, path) from error
            try:
                if not self._lock_descriptor(self._lock):
                    holder = _holder(self._lock)
                    self.close()
                    return holder
                is_taken = _is_still_at(path, self._lock)
            except BaseException:
                self.close()
                raise
            if not is_taken:  # likewise: what is locked is in no folder any more
                self.close()
        return None

    def _lock_descriptor(self, lock: int) -> bool:
        path = self.folder / LOCK
        try:
            _lock_patiently(lock)
        except BlockingIOError:
            return False
        except OSError as error:
            raise OutputError(
                f"{path} cannot be locked: {error.strerror}; choose an --out on a file system that has locks"
            ) from error
        return True

    def _open(self) -> None:
        """Go on with what is there if it is this run's, else begin anew. Raises OutputError if it is another's that
        someone may want, or holds what is somebody else's.
        """
        plan, lines = self.folder / PLAN, self.folder / LINES
        with _typed_errors(lines):
            goes_on = self.resume and self._is_same_run()
            if not goes_on:
                check_ours_alone(self.folder)
                check_no_part_at_work(self)
            self.take_over()
            if goes_on:
                self._take_up(lines)
            else:
                self._check = fingerprint_digest(self.fingerprint)
                # Where publishing had begun, that is never forgotten: what lies in the output's folder is ours.
                keep = {PLAN, PUBLISHING} if is_publishing(self.out) else set()
                remove_entries(self.folder, keep=frozenset({LOCK, *keep}))
                self.check_owner()
                write_file(plan, json.dumps(self.fingerprint, indent=1, sort_keys=True).encode())
            self._lines = open_own(lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        fsync_folder(self.folder)
        self.check_owner()

    def _is_same_run(self) -> bool:
        """Whether the folder's run is this one. Raises OutputError if it is another that someone may want."""
        if not is_there(self.folder, PLAN):
            return False
        found = _read_plan(self.folder / PLAN)
        if found == self.fingerprint:
            return True
        if not self._is_wanted(read_lines(self.folder / LINES, fingerprint_digest(found or {}))):
            return False
        if found is None:
            raise OutputError(
                f"{self.folder / PLAN} is damaged, so it is not known which run left unfinished work in {self.out}; "
                f"{self._discard}, or choose another --out"
            )
        differing = "; ".join(_differences(found, self.fingerprint)[:3])
        if self.worker:
            raise OutputError(
                f"{self.out} is being made, or was left unfinished, with other inputs, options, versions or another "
                f"kind of CPU or GPU ({differing}), and all parts of an output need the same; make them the same, "
                f"{self._discard}, or choose another --out"
            )
        raise OutputError(
            f"{self.out} holds an unfinished run with other inputs or options ({differing}); repeat that command to "
            f"finish it, {self._discard}, or choose another --out"
        )

    @property
    def _discard(self) -> str:
        if not self.worker:
            return "pass --no-resume to discard it"
        return f"delete {self.out / WORK_FOLDER} while nothing is at work there to discard it"

    def _is_wanted(self, recorded: Recorded) -> bool:
        """Whether what is there must not be discarded without being told to."""
        progress = recorded.progress
        if progress.is_worth_keeping or recorded.has_more or (self.has_passed and not progress.rejected):
            return True
        return part_at_work(self.folder) is not None or any(map(_is_worth_keeping, part_folders(self.folder)))

    def take_over(self) -> None:
        """Name this run as the folder's: another that holds itself for its owner, for want of locks, then stops."""
        assert self._lock is not None
        process = f"process {os.getpid()} on {socket.gethostname()}"
        who = f"{self.worker}, {process}" if self.worker else process
        owner = f"{who}\n{secrets.token_hex(16)}\n".encode()
        with _typed_errors(self.folder / LOCK):
            done = 0
            while done < len(owner):
                done += os.pwrite(self._lock, owner[done:], done)
            os.ftruncate(self._lock, done)
        self._owner = owner

    def _take_up(self, lines: Path) -> None:
        """Take in what the journal says, and cut off what is not believed, or the next line would be glued to it."""
        recorded = read_lines(lines, self._check)
        self.progress, self._check = recorded.progress, recorded.check
        with contextlib.suppress(FileNotFoundError):
            descriptor = open_own(lines, os.O_WRONLY)
            try:
                if os.fstat(descriptor).st_size > recorded.end:
                    os.ftruncate(descriptor, recorded.end)
            finally:
                os.close(descriptor)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._appending, _typed_errors(self.folder / LINES):
            assert self._lines is not None
            self.check_owner()
            line, self._check = encode_line(record, self._check)
            while line:
                line = line[os.write(self._lines, line) :]
            os.fsync(self._lines)
            self.progress.add(record)


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
    with _typed_errors(path):
        try:
            return os.path.samestat(path.lstat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False


def _holder(lock: int) -> str:
    try:
        return _first_line(os.pread(lock, 200, 0))
    except OSError:
        return "which one, cannot be read"


def _first_line(content: bytes) -> str:
    """Name of a run as a file has it, fit for a message: anybody may have written the file."""
    return one_line(content[:200].decode(errors="replace").partition("\n")[0].strip())


def check_no_part_at_work(journal: Journal) -> None:
    """Raise OutputError where a process makes a part of the output whose work folder this is."""
    if (holder := part_at_work(journal.folder)) is not None:
        raise OutputError(
            f"{journal.out} is in use by another run ({holder}), which makes a part of it; wait for it to end, or "
            "choose another --out"
        )


def _is_worth_keeping(part: Path) -> bool:
    """Whether a part has work that another run must not discard without being told to."""
    plan = _read_plan(part / PLAN) if is_there(part, PLAN) else None
    return plan is not None and read_lines(part / LINES, fingerprint_digest(plan)).progress.is_worth_keeping


def make_folder(folder: Path) -> None:
    """Make a folder of ours, and those above it. Raises OutputError, also where something else has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        check_kind(folder, FOLDER)
        raise lacking(error) or OutputError(
            f"cannot make the folder {folder}: {error.strerror}; choose another --out"
        ) from error
    check_kind(folder, FOLDER)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {folder}; check its permissions, or choose another --out")


def make_pass_folder(folder: Path, name: str) -> Path:
    """Make the folder `name` for a pass in a work folder, or find it there. Raises OutputError."""
    note = folder / note_of(name)
    if kind_at(note) is None:
        with _typed_errors(note):
            os.close(open_own(note, os.O_WRONLY | os.O_CREAT))
    make_folder(folder / name)
    return folder / name


def _read_plan(path: Path) -> Mapping[str, Any] | None:
    """The fingerprint of the run that a folder belongs to; None where it cannot be read as one."""
    content = read_own(path, _MAX_PLAN_BYTES)
    try:
        return None if content is None else parse_object(content, str(path), allow_nonfinite=True)
    except CheckpointError:
        return None


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
