"""Contents of a work folder: nothing in it is read or deleted that no run can have put there.

A folder is a run's own if it has a lock or a plan, or nothing at all; entries are its own by their names. Whatever else
is there belongs to somebody: it stays, and where it is in the way, the run ends before anything was deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from streamconv.checkpoint.own_files import check_kind, kind_at, odd_kind, read_error
from streamconv.checkpoint.writer import write_error
from streamconv.errors import OutputError
from streamconv.storage.local import FILE, FOLDER, LINK, list_folder

WORK_FOLDER = ".streamconv"
PLAN, LINES, LOCK, PUBLISHING = "plan.json", "journal.jsonl", "lock", "publishing"
REPLACED = "replaced"
"""Folder of files of the model that was there before, on their way out."""

_PASSES = ("calibration", "rescaling", "parts", REPLACED)
"""Folders that need no note beside them: those of passes, and the one in which an adapter is put together."""

_NOTE = ".folder"
_TOP = re.compile(
    r"plan\.json|journal\.jsonl|lock|publishing|[\w-]+\.folder"
    r"|(model(-\d+-of-\d+)?|adapter_model|factors-[0-9a-f]{32})(\.safetensors(\.partial)?|\.partial)"
    r"|model-[A-Z0-9_]+(-\d+-of-\d+)?\.gguf(\.partial)?"
    r"|\..+\.partial"
)
_IN_PASS = re.compile(r"[\w.-]+\.(safetensors|gguf|partial|json|jsonl|sha256)|[\w-]+")
_PART = re.compile(r"part-\d+-of-\d+")
_SHARDS = (".safetensors", ".gguf")
# Of the file system and the desktop, which make them again: neither in the way nor ours to delete.
_PASSING = re.compile(r"\.nfs[0-9a-f]+|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini")


def is_there(folder: Path, name: str) -> bool:
    """Whether a work folder has a file of this name. Raises OutputError where that cannot be found out."""
    return kind_at(folder) == FOLDER and kind_at(folder / name) == FILE


def check_entries(folder: Path) -> None:
    """Raise OutputError unless a run may move into the work folder: it is none of somebody else's, and what has a
    name of ours in it is what we make. There may be none.
    """
    check_kind(folder, FOLDER)
    names = _listed(folder)
    if not {LOCK, PLAN} & set(names):
        strange = [name for name in names if not _PASSING.fullmatch(name) and not _is_empty(folder / name)]
        if strange:
            raise _somebody_elses(folder, strange[0])
    for name in names:
        if _is_pass(folder, name):
            check_kind(folder / name, FOLDER)
            for inner in _listed(folder / name) if name != REPLACED else ():
                _check_ours(folder / name / inner, _IN_PASS)
        else:
            _check_ours(folder / name, _TOP)


def _check_ours(path: Path, names: re.Pattern[str]) -> None:
    found = kind_at(path)
    if names.fullmatch(path.name) and found not in (None, FILE):
        raise odd_kind(path, found or "")


def has_whole_files(folder: Path) -> bool:
    """Whether a pass has left a whole file in the work folder. Raises OutputError where that cannot be found out."""
    return any(
        path.suffix in _SHARDS and path.parent.name != REPLACED
        for path in _entries(folder)
        if path.parent != folder
    )


def check_ours_alone(folder: Path) -> None:
    """Raise OutputError if there is anything in the work folder that a run cannot have put there."""
    strange = next((path for path in _entries(folder) if not _is_ours(folder, path)), None)
    if strange is not None:
        raise _somebody_elses(folder, str(strange.relative_to(folder)))


def remove_entries(folder: Path, keep: frozenset[str]) -> None:
    """Delete what is a run's own in the work folder, plan and journal first; what is somebody else's stays.

    Raises OutputError where something cannot be deleted.
    """
    for path in (folder / PLAN, folder / LINES, *_entries(folder)):
        if path.name in keep and path.parent == folder:
            continue
        if _is_ours(folder, path):
            _remove(path)


def _entries(folder: Path) -> Iterator[Path]:
    """All in the folder, and in the folders of passes, these after what is in them."""
    for name in _listed(folder):
        if _is_pass(folder, name) and kind_at(folder / name) == FOLDER:
            yield from (folder / name / inner for inner in _listed(folder / name))
        if not _PASSING.fullmatch(name):
            yield folder / name


def _is_ours(folder: Path, path: Path) -> bool:
    kind = kind_at(path)
    if path.parent == folder / REPLACED:
        return kind in (None, FILE, LINK)
    if path.parent != folder:
        return kind in (None, FILE) and _IN_PASS.fullmatch(path.name) is not None
    if kind == FOLDER:
        return _is_pass(folder, path.name) or _is_empty(path)
    return kind in (None, FILE) and _TOP.fullmatch(path.name) is not None


def _is_pass(folder: Path, name: str) -> bool:
    return name in _PASSES or kind_at(folder / note_of(name)) == FILE


def note_of(pass_folder: str) -> str:
    """Name of the empty file that stands beside the folder of a pass, by which that is known as one."""
    return f"{pass_folder}{_NOTE}"


def part_folders(folder: Path) -> list[Path]:
    """Folders of parts in a work folder, each a work folder in itself, sorted. Raises OutputError."""
    names = [name for name in _listed(folder) if _PART.fullmatch(name) and _is_pass(folder, name)]
    return [folder / name for name in names if kind_at(folder / name) == FOLDER]


def remove_part(folder: Path) -> None:
    """Delete the folder of a part, with what is a run's own in it, and the note beside it. Raises OutputError."""
    remove_entries(folder, keep=frozenset())
    _remove(folder)
    if kind_at(folder) is None:
        _remove(folder.with_name(note_of(folder.name)))


def _is_empty(path: Path) -> bool:
    return kind_at(path) == FOLDER and not _listed(path)


def _remove(path: Path) -> None:
    try:
        if kind_at(path) == FOLDER:
            if not _listed(path):  # what is somebody else's has stayed in it
                path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, path) from error


def _listed(folder: Path) -> list[str]:
    try:
        return [path.name for path in list_folder(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise read_error(error, folder) from error


def _somebody_elses(folder: Path, name: str) -> OutputError:
    return OutputError(
        f"{folder} is where streamconv keeps unfinished work, and {name!r} in it is not of its making; nothing was "
        "deleted: move it away, or choose another --out"
    )
