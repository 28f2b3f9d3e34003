"""Where checkpoints live: which backend a location belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from streamconv.errors import UnsupportedError
from streamconv.storage.base import Storage
from streamconv.storage.local import open_folder


def open_storage(location: str) -> Storage:
    """The storage at `location`: a folder's path, or a Hub id such as `org/model`.

    Raises CheckpointError if the folder does not exist, UnsupportedError for a kind that is not in STORAGES.
    """
    kind = storage_kind(location)
    if kind not in STORAGES:
        raise UnsupportedError(
            f"{location!r} is no folder here, so it would be a Hub id, and those are not read yet;"
            f" download it first (hf download {location.removeprefix('hf://')} --local-dir DIR)"
            " and give that folder"
        )
    return STORAGES[kind](location)


def storage_kind(location: str) -> str:
    """`folder` or `hub`. An existing path wins; what looks like a path is never taken for a Hub id."""
    if location.startswith("hf://"):
        return "hub"
    looks_like_path = (
        not location.strip()
        or location.startswith((".", "/", "~"))
        or location.count("/") > 1
        or "\\" in location
        or "\0" in location
    )
    # Unlike Path.exists, this is False for a name that is too long and for a folder that may not be looked into.
    return "folder" if looks_like_path or os.path.exists(location) else "hub"  # noqa: PTH110


STORAGES: Mapping[str, Callable[[str], Storage]] = MappingProxyType({"folder": open_folder})
