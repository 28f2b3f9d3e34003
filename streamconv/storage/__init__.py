"""Storages of checkpoints, and the backend that a location belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from streamconv.errors import OptionError
from streamconv.storage.base import Storage
from streamconv.storage.hub import HF, open_hub
from streamconv.storage.local import LocalFolder, find_file, open_subfolder
from streamconv.storage.objects import SCHEMES, open_objects


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of STORAGES. `open` takes location, revision and subfolder; `prefix` is what locations begin with that
    are certainly its own, None where there is no such sign.
    """

    open: Callable[[str, str | None, str | None], Storage]
    prefix: str | None = None


def open_storage(location: str, revision: str | None = None, subfolder: str | None = None) -> Storage:
    """The storage at `location`: a folder's path, a Hub id such as `org/model`, `org/model@v1`, `hf://org/model`, or
    `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.

    `revision` is a branch, tag or commit of a Hub id, `subfolder` a folder inside. Raises CheckpointError if a
    folder does not exist, HubError if the Hub does not show the model, StoreError if an object store does not,
    OptionError for what is neither.
    """
    return STORAGES[storage_kind(location)].open(location, revision, subfolder)


def open_adapter(location: str, revision: str | None = None, subfolder: str | None = None) -> Storage:
    """`open_storage` of an adapter, which may also be one file of its own, such as `lora.gguf`."""
    if revision is None and subfolder is None and (found := find_file(location)) is not None:
        return found
    return open_storage(location, revision, subfolder)


def storage_kind(location: str) -> str:
    """Key in STORAGES of `location`: by its prefix, else `folder` or `hub`.

    An existing path wins; what looks like a path is never taken for a Hub id.
    """
    for kind, backend in STORAGES.items():
        if backend.prefix is not None and location.startswith(backend.prefix):
            return kind
    name, _, revision = location.partition("@")
    is_reference = revision.startswith("refs/")  # the one kind of revision that needs slashes: refs/pr/3
    looks_like_path = (
        not location.strip()
        or location.startswith((".", "/", "~"))
        or (name if is_reference else location).count("/") > 1
        or "\\" in location
        or "\0" in location
    )
    # Unlike Path.exists, this is False for a name that is too long and for a folder that may not be looked into; a link
    # that leads nowhere is no Hub id, either.
    return "folder" if looks_like_path or os.path.lexists(location) else "hub"


def _open_folder(location: str, revision: str | None, subfolder: str | None) -> LocalFolder:
    if revision is not None:
        raise OptionError(
            f"{location} is a folder here and has no revision {revision}; leave the revision out"
        )
    return open_subfolder(location, subfolder)


STORAGES: Mapping[str, Backend] = MappingProxyType(
    {
        "folder": Backend(_open_folder),
        "hub": Backend(open_hub, prefix=HF),
        **{scheme: Backend(open_objects, prefix=f"{scheme}://") for scheme in SCHEMES},
    }
)
