"""A repository as the Hub lists it: commit and files, every one checked before anything is done by it."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import HfApi, constants

from streamconv.errors import HubError
from streamconv.storage.base import Origin
from streamconv.storage.blobs import BLOB_ID, HubFile
from streamconv.storage.hub_errors import endpoint, without_token
from streamconv.storage.local import is_inside

COMMIT = re.compile(r"[0-9a-f]{40}")


def list_commit(repo: str, revision: str) -> tuple[Origin, dict[str, HubFile], Any]:
    """Commit of a revision, its files by path, and all else the Hub tells of the repository, in one request.

    Names that lead outside the repository are left out. Raises HubError where the answer is no listing.
    """
    found = HfApi().model_info(
        repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    commit = check_commit(repo, found.sha)
    files = {}
    for file in found.siblings or ():
        name, size, blob = file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id
        if not isinstance(name, str):
            raise _odd(repo, f"a file named {name!r}")
        if not is_inside(name):
            continue
        if type(size) is not int or size < 0:
            raise _odd(repo, f"{name} with {size!r} bytes")
        if not isinstance(blob, str) or not BLOB_ID.fullmatch(blob):
            raise _odd(repo, f"{name} with the content {blob!r}, expected a SHA-256 or git's id of it")
        files[name] = HubFile(size, blob)
    return Origin(repo, commit), files, found


def check_commit(repo: str, commit: object) -> str:
    """The commit, 40 hexadecimal digits. Raises HubError for anything else, which may be part of no path."""
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _odd(repo, f"the commit {commit!r}, expected 40 hexadecimal digits")
    return commit


def _odd(repo: str, listed: str) -> HubError:
    return HubError(
        f"{repo}: the Hub ({endpoint()}) lists {without_token(listed)[:200]}; if HF_ENDPOINT names a mirror, use"
        " another or unset it, or download the model by other means and give its folder"
    )
