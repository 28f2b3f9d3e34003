"""The manifest read back: every field that is used is checked, as anybody may have written it, or a disk harmed it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, NoReturn

from streamconv.checkpoint.container import CONFIG, GGUF_SUFFIX
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError, InputError, UnsupportedError, VerificationError
from streamconv.output.manifest import MANIFEST_VERSION, SEAL, SIDECARS, is_sealed, is_sha256
from streamconv.output.published import JSON_OBJECT, TEXT, is_bloated, may_be_edited
from streamconv.storage.base import Storage
from streamconv.storage.local import is_inside

_MAX_BYTES = 64 * 2**20
_MOST_FILES = 20_000
_MOST_BYTES = 2**62
_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """A published file: size in bytes, SHA-256 in hexadecimal, and the form it had if it may be edited."""

    size: int
    sha256: str
    form: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of an output by name, as its manifest lists them, and the manifest itself.

    `files` decide how the model computes or reads text, `editable` do not. Manifests of version 1 list only some files:
    `is_complete` is False.
    """

    content: Mapping[str, Any]
    raw: bytes
    shards: Mapping[str, Entry]
    files: Mapping[str, Entry]
    editable: Mapping[str, Entry]

    @property
    def is_complete(self) -> bool:
        return bool(self.content["manifest_version"] > 1)

    @property
    def all(self) -> Mapping[str, Entry]:
        """All files listed."""
        return {**self.shards, **self.files, **self.editable}

    @property
    def size(self) -> int:
        """Bytes of all files listed."""
        return sum(entry.size for entry in self.all.values())


def read_listing(storage: Storage, name: str) -> Listing:
    """The manifest of an output. Raises InputError where there is none or it is no JSON, VerificationError where it is
    not as it was written.
    """
    if name not in storage.names():
        raise InputError(f"{storage.location} has no {name}, so it is no finished output of streamconv")
    return parse_manifest(storage.read_bytes(name, _MAX_BYTES), f"{storage.location}: {name}")


def parse_manifest(raw: bytes, where: str) -> Listing:
    """The manifest that these bytes are; `where` names it in messages. Raises as `read_listing` does."""
    content = _parse(raw, where)
    version = content.get("manifest_version")
    is_first = isinstance(version, int) and version is not True and version == 1
    if not is_first or SEAL in content or SIDECARS in content:
        if not is_sealed(raw, content.get(SEAL)):
            _damaged(where, "its bytes do not have the hash that stands in it")
        if version not in range(2, MANIFEST_VERSION + 1) or isinstance(version, float):
            raise UnsupportedError(
                f"{where} is of version {shown(version)}, and this streamconv reads those up to {MANIFEST_VERSION};"
                " update streamconv"
            )
    else:
        content = {**_LATER, **content}
    for field, is_right in _FIELDS.items():
        if not is_right(content.get(field)):
            _damaged(where, f"{field} cannot be {shown(content.get(field))}")
    shards, files, sidecars = (_entries(content, key, where) for key in ("shards", "files", SIDECARS))
    names = [*shards, *files, *sidecars]
    if len(names) > len(set(names)):
        _damaged(where, "a file is listed twice")
    if CONFIG not in files and not is_first and not all(name.endswith(GGUF_SUFFIX) for name in shards):
        _damaged(where, f"{CONFIG} is not listed")
    beside = {**files, **sidecars}
    editable = {name: entry for name, entry in beside.items() if may_be_edited(name) and not is_first}
    return Listing(
        content=MappingProxyType(content),
        raw=raw,
        shards=shards,
        files={name: entry for name, entry in beside.items() if name not in editable},
        editable=editable,
    )


def _damaged(where: str, why: str) -> NoReturn:
    raise VerificationError(
        f"{where} was changed since it was written: {why}; restore it, or do not use this output"
    )


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    """The object in a manifest. Unlike other files it may hold lone surrogates: names that are not UTF-8 have them."""
    try:
        if is_bloated(raw):
            raise ValueError("more values than a manifest has")
        found = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
        if _depth(found) > _DEPTH:
            raise ValueError("nested too deeply")
    except RecursionError as error:
        raise CheckpointError(f"{where} is not valid JSON: nested too deeply; restore it") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:300]}; restore it") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} must hold a JSON object, found {shown(found)}")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _depth(value: Any) -> int:
    """Depth of lists and objects in one another, counted up to one more than is allowed."""
    depth, level = 0, [value]
    while depth <= _DEPTH and (level := [each for each in level if isinstance(each, dict | list)]):
        depth += 1
        level = list(chain.from_iterable(_inside(each) for each in level))
    return depth


def _inside(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_BYTES
    )


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# Fields that versions before did not have, as they are read.
_LATER: Mapping[str, Any] = MappingProxyType(
    {
        "streamconv": "",
        "quant": "none",
        "kept_delta": None,
        "kept_by_weight": {},
        "base_error_to_delta": None,
        "fingerprint": {},
        SIDECARS: {},
    }
)
_FIELDS: Mapping[str, Callable[[object], bool]] = MappingProxyType(
    {
        "streamconv": _is_text,
        "quant": _is_text,
        "kept_delta": _is_number_or_none,
        "kept_by_weight": _are_numbers,
        "base_error_to_delta": _is_number_or_none,
        "fingerprint": _is_object,
        "shards": bool,
        "files": bool,
        SIDECARS: _is_object,
    }
)


def _entries(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Entry]:
    """Entries of files by name, as the manifest lists them under `key`."""
    found = content[key]
    if not isinstance(found, dict) or len(found) > _MOST_FILES:
        _damaged(where, f"{key} must list the files of an output, found {shown(found)}")
    entries = {}
    for name, entry in found.items():
        if not is_inside(name) or not _is_encodable(name):
            _damaged(where, f"{key} lists {shown(name)}, which is no name of a file inside the folder")
        entries[name] = _entry(entry, f"{key} of {shown(name)}", where)
    return MappingProxyType(entries)


def _entry(found: Any, named: str, where: str) -> Entry:
    size, sha256, form = (
        map(found.get, ("size", "sha256", "form")) if isinstance(found, dict) else (None, None, None)
    )
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MOST_BYTES:
        _damaged(where, f"{named} must have a size in bytes, found {shown(size)}")
    if not isinstance(sha256, str) or not is_sha256(sha256):
        _damaged(where, f"{named} must have a SHA-256, found {shown(sha256)}")
    if form not in (None, JSON_OBJECT, TEXT):
        _damaged(where, f"{named} must have a form that is known, found {shown(form)}")
    return Entry(size, sha256, form)


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeError:
        return False
    return True
