"""Lines of a journal: what each says, written so that damage shows, and read so that nothing damaged is believed.

A line is a JSON object whose last member, `check`, is a hash of the line and of all lines before it, beginning with
the fingerprint of the run. So a flipped digit is seen, and a line that is missing, and one of another run. The first
line that is not as it was written, and all behind it, count as not there: what they said is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.checkpoint.own_files import Sighting, open_own, read_error
from streamconv.checkpoint.strict_json import parse_object
from streamconv.errors import CheckpointError

# One line holds the sums of a shard's weights, some 100 bytes for each expert of a model.
_MAX_LINE_BYTES = 64 * 2**20
_LINE = re.compile(rb'(\{.*), "check": "([0-9a-f]{16})"\}\n')
# Or a word in its place, such as where `extract` is done with a weight that has no file; the check is what protects it.
_SHA256 = re.compile(r"[0-9a-z]{1,64}")
_MEMBERS = {
    "identity": {"identity", "inode", "size", "modified_ns"},
    "watermark": {"watermark", "offset", "sha256", "sums"},
    "finished": {"finished", "sha256", "sums"},
    "restart": {"restart"},
    "publishing": {"publishing"},
    "rejected": {"rejected"},
}


@dataclass(frozen=True, slots=True)
class Watermark:
    """The first `offset` bytes of a shard are on disk, and hash to `sha256`."""

    offset: int
    sha256: str


@dataclass(slots=True)
class Progress:
    """Progress that the journal records. `sums` are kept-delta sums by weight name, `sightings` those of finished
    shards that a part has made.
    """

    finished: dict[str, str] = field(default_factory=dict)  # shard name -> sha256
    watermarks: dict[str, Watermark] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)
    publishing: bool = False
    rejected: bool = False
    sightings: dict[str, Sighting] = field(default_factory=dict)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a run of other inputs or options must not discard it without being told to."""
        return bool(self.finished or self.watermarks or self.publishing) and not self.rejected

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in what a line says."""
        self.sums.update(record.get("sums", {}))
        if "watermark" in record:
            self.watermarks[record["watermark"]] = Watermark(record["offset"], record["sha256"])
        elif "finished" in record:
            self.finished[record["finished"]] = record["sha256"]
        elif "identity" in record:
            seen = Sighting(record["inode"], record["size"], record["modified_ns"])
            self.sightings[record["identity"]] = seen
        elif "restart" in record:
            self.watermarks.pop(record["restart"], None)
            self.finished.pop(record["restart"], None)
        elif "publishing" in record:
            self.publishing, self.rejected = True, False
        elif "rejected" in record:
            self.rejected = True


@dataclass(frozen=True, slots=True)
class Recorded:
    """Facts that a journal tells: `progress`, the place in bytes where its last good line ends, and that line's check.

    `has_more`: behind that there are whole lines, which are not believed.
    """

    progress: Progress
    end: int
    check: str
    has_more: bool


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """The check that stands before the first line of a run's journal."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def encode_line(record: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """The line of a record, and its check; `before` is that of the line before."""
    body = json.dumps(record).encode()
    check = _check(body, before)
    return body[:-1] + f', "check": "{check}"}}\n'.encode(), check


def read_lines(path: Path, start: str) -> Recorded:
    """Read what the journal at `path` says of the run whose fingerprint digest is `start`: nothing where there is none.

    Raises OutputError where it is no regular file, or cannot be read.
    """
    progress, end, check = Progress(), 0, start
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                record = _decoded(line, check)
                if record is None:
                    return Recorded(progress, end, check, line.endswith(b"\n"))
                found, check = record
                progress.add(found)
                end += len(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise read_error(error, path) from error
    return Recorded(progress, end, check, has_more=False)


def _decoded(line: bytes, before: str) -> tuple[Mapping[str, Any], str] | None:
    """The record of a line, and its check; None unless it is as it was written."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    body, check = found[1] + b"}", found[2].decode()
    if _check(body, before) != check:
        return None
    try:
        record = parse_object(
            body, "journal", allow_nonfinite=True
        )  # sums of a broken weight may be infinite
    except CheckpointError:
        return None
    return (record, check) if _is_record(record) else None


def _check(body: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:16]


def _is_record(record: Mapping[str, Any]) -> bool:
    kind = next(iter(record), "")
    if _MEMBERS.get(kind) != set(record):
        return False
    name = record[kind]
    if kind in ("publishing", "rejected"):
        return name is True
    numbers = [record[key] for key in ("offset", "inode", "size", "modified_ns") if key in record]
    sha256 = record.get("sha256", "0")
    return (
        isinstance(name, str)
        and all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(sha256, str)
        and _SHA256.fullmatch(sha256) is not None
        and _are_sums(record.get("sums", {}))
    )


def _are_sums(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(sums, list) and len(sums) == 3 and all(type(each) in (int, float) for each in sums)
        for sums in found.values()
    )
