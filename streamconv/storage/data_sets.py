"""Data sets of the Hub: how they are named, and which commit one is at."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants

from streamconv.storage.hub_errors import hub_errors
from streamconv.storage.listing import check_commit

_NAMED = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+?))?(?::([\w.\[\]%:+-]+))?")
_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True, slots=True)
class DataSet:
    """`name` is `org/name`; `revision` a branch, tag or commit, None for the one that is used by default."""

    name: str
    revision: str | None
    split: str

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.name}{at}:{self.split}"


def data_set_of(data: str | Path) -> DataSet | None:
    """Data set that `org/name`, `org/name@revision` and either with `:split` name; None for a file, there or not."""
    found = _NAMED.fullmatch(str(data))
    if found is None or Path(data).suffix in _SUFFIXES or Path(data).expanduser().exists():
        return None
    return DataSet(found[1], found[2], found[3] or "train")


def pinned(data_set: DataSet) -> DataSet:
    """Data set at the commit (40 hex digits) that it is at now. Raises HubError where the Hub does not show it."""
    revision = data_set.revision or constants.DEFAULT_REVISION
    with hub_errors(f"datasets/{data_set.name}", revision):
        found = HfApi().dataset_info(data_set.name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return replace(data_set, revision=check_commit(f"datasets/{data_set.name}", found.sha))
