"""Store of finished parts of a comparison: files in `OUT/.comparison/`, each whole once it is there.

A note has the SHA-256 of what it says: a damaged one counts as not there, and what it said is done again.

    subject.json      base and adapter that the folder is about
    rows/NAME.json    the numbers of a strategy, with the key that stands for all that they depend on
    making/NAME.json  for which output its folder is
    made/NAME.json    what its merge told, as long as the output is there
    kept/NAME.json    says that the output is there to stay
    reference/        what the reference answers (see evaluation/kept_reference.py), until all are judged

The output of a strategy lies in `OUT/models/NAME` and goes on by its own journal.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from streamconv.checkpoint.own_files import check_kind, kind_at, read_own
from streamconv.checkpoint.strict_json import parse_object
from streamconv.checkpoint.writer import remove_file, write_error, write_file
from streamconv.comparison.result import Numbers, numbers_of
from streamconv.errors import CheckpointError, OutputError
from streamconv.output.journal import WORK_FOLDER as JOURNAL_FOLDER
from streamconv.output.journal import Journal, make_folder
from streamconv.output.place import check_place, check_reachable
from streamconv.storage.local import FOLDER, list_folder

WORK_FOLDER, MODELS = ".comparison", "models"
_MAX_NOTE_BYTES = 256 * 2**20
_NOTES = ("rows", "making", "made", "kept")


@dataclass(frozen=True, slots=True)
class Made:
    """Numbers told by a merge. `seconds` is None where it found its output finished."""

    kept_delta: float | None
    seconds: float | None
    resumed: bool
    peak_ram_bytes: int | None


@dataclass(frozen=True, slots=True)
class Store:
    """The work folder of the comparison in `out`, this process's own, by `journal`, while the store is open."""

    out: Path
    journal: Journal | None = None

    @property
    def folder(self) -> Path:
        return self.out / WORK_FOLDER

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def model(self, name: str) -> Path:
        """Folder of a strategy's output."""
        return self.out / MODELS / name

    def numbers(self, name: str, key: str) -> Numbers | None:
        """Those of a row under this key, if they are there."""
        found = self._read("rows", name, key)
        return None if found is None else numbers_of(found)

    def keep_numbers(self, name: str, key: str, numbers: Numbers) -> None:
        self._write("rows", name, key, asdict(numbers))

    def made(self, name: str, key: str) -> Made | None:
        found = self._read("made", name, key)
        return None if found is None else Made(**found)

    def keep_made(self, name: str, key: str, made: Made) -> None:
        self._write("made", name, key, asdict(made))

    def claim_model(self, name: str, digest: str, goes_on: bool) -> None:
        """Claim the folder of a strategy for the output whose plan has this digest. What lies there for
        another goes, and what cannot be gone on with; one that was to stay is replaced, and its successor stays.
        """
        if not self.model(name).exists():
            remove_file(self._note("kept", name))
        if not goes_on or self._read("making", name, digest) is None:
            self.remove_model(name)
        self._write("making", name, digest, {})

    def is_kept(self, name: str) -> bool:
        """Whether the output is there to stay."""
        return self._read("kept", name, "") is not None and self.model(name).exists()

    def keep_model(self, name: str) -> None:
        """Let the output stay, in later runs, too."""
        self._write("kept", name, "", {})

    def drop_model(self, name: str) -> None:
        """Remove an output that is not there to stay. Raises OutputError where that is not possible."""
        if not self.is_kept(name):
            self.remove_model(name)

    def remove_model(self, name: str) -> None:
        """Raises OutputError where that is not possible."""
        _remove(self.model(name))
        for kind in ("making", "made"):
            remove_file(self._note(kind, name))

    def clear_up(self) -> None:
        """All has been judged: remove what only helped."""
        _remove(self.reference)
        with suppress(OSError):  # outputs that stay are in it, or it is not there
            (self.out / MODELS).rmdir()

    def _note(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.json"

    def _read(self, kind: str, name: str, key: str) -> dict[str, Any] | None:
        content = read_own(self._note(kind, name), _MAX_NOTE_BYTES)
        with suppress(CheckpointError):
            note = parse_object(content or b"", name, allow_nonfinite=True)
            if note.get("sha256") == _digest(note.get("key"), note.get("found")) and note["key"] == key:
                return cast("dict[str, Any]", note["found"])
        return None

    def _write(self, kind: str, name: str, key: str, found: Mapping[str, Any]) -> None:
        path = self._note(kind, name)
        make_folder(path.parent)
        if self.journal is not None:
            self.journal.check_owner()
        note = {"key": key, "found": found, "sha256": _digest(key, found)}
        write_file(path, (json.dumps(note) + "\n").encode())


def _digest(key: object, found: object) -> str:
    """SHA-256 of what a note says, by which damage to it shows: it is then made again."""
    return hashlib.sha256(json.dumps([key, found]).encode()).hexdigest()


@contextmanager
def open_store(out: Path, inputs: Mapping[str, Path], subject: str, overwrite: bool) -> Iterator[Store]:
    """The store in `out`, locked. `subject` stands for base and adapter, whose folders are `inputs`.

    With `overwrite` it begins empty. Raises OutputError where `out` is in use or holds something else, be it a
    comparison of another subject that is not to be overwritten.
    """
    _check_place(out, inputs)
    known = out / WORK_FOLDER / "subject.json"
    lock = Journal(out / WORK_FOLDER, {}, resume=True)
    store = Store(out, lock)
    lock.lock()
    try:
        found = read_own(known, _MAX_NOTE_BYTES) if kind_at(known) else subject.encode()
        if not overwrite and found != subject.encode():
            raise OutputError(
                f"{out} holds the comparison of another base or adapter; choose another --out, or --overwrite"
            )
        lock.take_over()
        if overwrite:
            for name in (*_NOTES, "reference"):
                _remove(store.folder / name)
            _remove(out / MODELS)
        write_file(known, subject.encode())
        yield store
    finally:
        lock.close()


def _check_place(out: Path, inputs: Mapping[str, Path]) -> None:
    """Raise OutputError where `out` holds anything but a comparison, or a link in the place of what we make there."""
    folder = out / WORK_FOLDER
    check_reachable(out)
    for path in (folder, out / MODELS, *(folder / name for name in (*_NOTES, "reference"))):
        check_kind(path, FOLDER)
    try:
        # Whether it holds something else is said below: no --overwrite replaces what is no comparison.
        check_place(out, inputs, False, True)
        others = [] if kind_at(folder / "subject.json") or not out.is_dir() else _others(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be used: {error.strerror}; choose another --out") from error
    if others:
        raise OutputError(
            f"{out} is not empty ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}) and holds no comparison; "
            "choose another --out"
        )


def _others(out: Path) -> list[str]:
    """All in the folder and its work folder but what a comparison makes before it is known for one."""
    folder = out / WORK_FOLDER
    inside = [path.name for path in list_folder(folder)] if folder.exists() else []
    begun = {JOURNAL_FOLDER, ".subject.json.partial"}
    return sorted({path.name for path in list_folder(out)} - {WORK_FOLDER}) + [
        f"{WORK_FOLDER}/{name}" for name in sorted({*inside} - begun)
    ]


def _remove(folder: Path) -> None:
    if kind_at(folder):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise write_error(error, folder) from error
