"""Two folders of outputs, compared file by file; and what of them may differ.

Outputs hold no time, no path and no memory: nothing changes from run to run. Versions of streamconv alone may differ
between the two trees. They stand in the manifest, in its fingerprint, and in the config of a gptq model; `digest` is
a hash of the fingerprint, `files` and `sidecars` are hashes of files that are compared here one by one, and
`manifest_sha256` is that of the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "streamconv.json"
VERSION = "streamconv"
FOLLOW_FROM_VERSIONS = ("digest", "files", "sidecars", "manifest_sha256")
NAMED = 1


@dataclass(frozen=True, slots=True)
class Differences:
    """Sentences about what differs, a file each, and size of the first folder."""

    files: int
    nbytes: int
    found: tuple[str, ...]


def compare(folder: Path, reference: Path) -> Differences:
    """What of the files of `folder`, and of folders in it, is not as in `reference`."""
    ours, theirs = _files(folder), _files(reference)
    versions = _version(folder), _version(reference)
    found = [f"{name} is missing" for name in sorted(theirs.keys() - ours.keys())]
    found += [f"{name} is new" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if _hash(ours[name]) != _hash(theirs[name]):
            places = _places(ours[name], theirs[name], versions)
            found += [f"{name}: {places}"] if places else []
    return Differences(len(ours), sum(path.stat().st_size for path in ours.values()), tuple(found))


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(folder: Path) -> str:
    """The version that wrote a folder, by its manifest; empty where there is none that can be read."""
    try:
        return str(json.loads((folder / MANIFEST).read_text())[VERSION])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _places(path: Path, reference: Path, versions: tuple[str, str]) -> str:
    """Where two files that are not the same differ, shortened; empty if they do not but for versions."""
    try:
        if path.suffix == ".json":
            ours, theirs = (_neutral(*each) for each in zip((path, reference), versions, strict=True))
            return _shorten(_json_places(ours, theirs, path.name == MANIFEST and versions[0] != versions[1]))
        if path.suffix == ".safetensors":
            return _shorten(_tensors(path, reference))
    except (ValueError, LookupError, TypeError, AttributeError):
        return "bytes; one of the two cannot be read"
    lines = zip(path.read_bytes().splitlines(), reference.read_bytes().splitlines(), strict=False)
    number = next((number for number, (ours, theirs) in enumerate(lines, 1) if ours != theirs), None)
    return f"line {number}" if number else "length"


def _neutral(path: Path, version: str) -> str:
    """The text of a JSON file with the version that wrote it replaced."""
    text = path.read_text()
    if not version:
        return text
    for written in (f'"{VERSION}": "{version}"', f'"{VERSION}:{version}"'):
        text = text.replace(written, written.replace(version, "VERSION"))
    return text


def _json_places(ours: str, theirs: str, by_versions: bool) -> list[str]:
    """Keys that differ; `by_versions`: the file is a manifest, and those that follow from versions are left aside."""
    if ours == theirs:
        return []
    found = list(_keys(json.loads(ours), json.loads(theirs), ""))
    if by_versions:
        return [key for key in found if key.split(".")[0] not in FOLLOW_FROM_VERSIONS]
    return found or ["the same values, written otherwise"]


def _shorten(places: list[str]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more


def _keys(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    """Paths of keys whose values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if (key in ours) != (key in theirs):
                yield f"{path}{key} ({'new' if key in ours else 'missing'})"
            else:
                yield from _keys(ours[key], theirs[key], f"{path}{key}.")
    elif ours != theirs:
        yield path.removesuffix(".") or "its value"


def _tensors(path: Path, reference: Path) -> list[str]:
    """Tensors of which type, shape, place or bytes differ; all that is not in one is called header."""
    ours, theirs = _read_tensors(path), _read_tensors(reference)
    return [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)] or [
        "header"
    ]


def _read_tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    """The entry of each tensor in the header, and its bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry, content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in header.items()
    }
