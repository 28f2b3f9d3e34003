"""Bytes of a file on the Hub, by a ranged request: an answer that is not those bytes is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from streamconv.errors import HubError
from streamconv.storage.base import Origin
from streamconv.storage.blobs import BLOB_ID, HubFile
from streamconv.storage.hub_errors import without_token

_PARTIAL = 206
_SPAN = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def request_range(origin: Origin, path: str, file: HubFile, start: int, length: int) -> bytes:
    """The `length` bytes from byte `start` on of `path` in the repository, which is listed as `file`.

    Reads no more where a server ignores the range and answers with the whole file. Raises HubError for fewer bytes,
    another range, or an answer whose headers name another commit, size or content than was listed.
    """
    last = start + length - 1
    headers = build_hf_headers() | {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
    parts, before, left = [], 0, length
    with http_stream_backoff(
        "GET",
        hf_hub_url(origin.repo, path, revision=origin.commit),
        headers=dict(headers),
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        max_retries=3,
    ) as response:
        hf_raise_for_status(response)
        found = _differs([*response.history, response], origin.commit, file, start)
        if found is not None:
            raise _wrong(origin, path, start, found)
        if response.status_code != _PARTIAL:
            before = start
        for part in response.iter_bytes():
            skipped = min(before, len(part))
            before -= skipped
            parts.append(part[skipped : skipped + left])
            left -= len(parts[-1])
            if not left:
                break
    if left:
        raise _wrong(origin, path, start, f"{length - left} of the{'' if start else ' first'} {length} bytes")
    return b"".join(parts)


def _differs(responses: Iterable[Any], commit: str, file: HubFile, start: int) -> str | None:
    """Difference between listing and answer, the redirects to it included; None if there is none to be seen."""
    for response in responses:
        headers: Mapping[str, str] = response.headers
        if headers.get("X-Repo-Commit", commit) != commit:
            return f"commit {headers['X-Repo-Commit']!r}"
        # A store that a redirect leads to has ETags of its own kind; those of the two forms are the Hub's.
        tag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).removeprefix("W/").strip('"')
        if BLOB_ID.fullmatch(tag) and len(tag) == len(file.blob) and tag != file.blob:
            return f"the content {tag}, where {file.blob} is listed"
        if response.is_redirect:
            continue
        if headers.get("Content-Type", "").startswith("text/html"):  # a network's login page has no such file
            return "a web page"
        size = _whole_size(response, start)
        if size is None:
            return f"the range {headers.get('Content-Range', '')!r}, which was not asked for"
        if size not in ("*", str(file.size)):
            return f"{size} bytes in all, where {file.size} are listed"
    return None


def _whole_size(response: Any, start: int) -> str | None:
    """Size of the whole file, as an answer tells it; `*` where it does not; None if it starts elsewhere."""
    if response.status_code == _PARTIAL:
        span = _SPAN.fullmatch(response.headers.get("Content-Range", ""))
        return span[3] if span and int(span[1]) == start else None
    if "Content-Encoding" in response.headers:
        return "*"
    size: str = response.headers.get("Content-Length", "*")
    return size


def _wrong(origin: Origin, path: str, start: int, found: str) -> HubError:
    place = f"a part of {path}, from byte {start}" if start else f"the start of {path}"
    return HubError(
        f"{origin.repo}: {place} was asked for and the answer has {without_token(found)[:200]};"
        " something between the Hub and here alters or cuts answers (a proxy, a mirror, a login page): run the same"
        " command again, or from another network"
    )
