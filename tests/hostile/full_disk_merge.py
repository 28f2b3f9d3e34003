"""Merges onto a disk that fills up at several moments; prints what happened as JSON. Run by test_full_disk_merge.py.

A process of its own, because only that one may see the tiny file system mounted at DISK. INPUTS lie elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from streamconv import cli
from streamconv.checkpoint.writer import free_bytes
from streamconv.output.place import check_disk
from streamconv.output.publish import publish_output
from streamconv.output.sink import ShardSink
from streamconv.pipeline import production, runner
from streamconv.planning.plan import ShardPlan

INPUTS, DISK = Path(sys.argv[1]), Path(sys.argv[2])
OUT, FILLER = DISK / "out", DISK / "filler"


def merge() -> dict[str, object]:
    """One run: exit code, what it said, and all files of the output that are not in the work folder."""
    said, code = io.StringIO(), 0
    arguments = ["merge", "--base", INPUTS / "base", "--adapter", INPUTS / "adapter", "-o", OUT, "--quiet"]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main(list(map(str, arguments)), prog_name="streamconv")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    files = [path for path in sorted(OUT.glob("*")) if path.is_file()] if OUT.exists() else []
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"code": code, "text": said.getvalue(), "files": hashes}


def fill(leaving: int = 0) -> None:
    """Take all space but `leaving` bytes, for good."""
    with FILLER.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(FILLER) // 4096 * 4096 - leaving)


def at_once() -> None:
    """Nothing is patched: there is less than the run is known to need."""


def when_a_shard_begins(number: int) -> Callable[[], None]:
    """Another takes the space after the check: before this shard's own is reserved."""

    def patch() -> None:
        patches.setattr(production, "check_disk", partial(check_disk, spare_bytes=0))
        begin, begun = ShardSink.begin, []

        def filling(sink: ShardSink, shard: ShardPlan) -> None:
            begun.append(shard.name)
            if len(begun) == number:
                sink.drain()  # or the end of the shard before takes space while that is being counted
                fill()
            begin(sink, shard)

        patches.setattr(ShardSink, "begin", filling)

    return patch


def when_the_journal_grows() -> None:
    """After the first shard's space is reserved; the journal's first line then finds no room."""
    patches.setattr(production, "check_disk", partial(check_disk, spare_bytes=0))
    begin = ShardSink.begin

    def filling(sink: ShardSink, shard: ShardPlan) -> None:
        sink.drain()  # or the second shard might meet the full disk first
        begin(sink, shard)
        fill()

    patches.setattr(ShardSink, "begin", filling)


def when_publishing_begins() -> None:
    """All shards are made; no room for the small files beside them."""
    patches.setattr(production, "check_disk", partial(check_disk, spare_bytes=0))
    publish = publish_output

    def filling(*given: object) -> None:
        fill()
        publish(*given)  # type: ignore[arg-type]  # passed on as it came

    patches.setattr(runner, "publish_output", filling)


MOMENTS = {
    "at once": at_once,
    "first shard": when_a_shard_begins(1),
    "second shard": when_a_shard_begins(2),
    "journal": when_the_journal_grows,
    "publishing": when_publishing_begins,
}


def clear() -> None:
    for path in sorted(DISK.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


if __name__ == "__main__":
    found = {}
    for moment, patch in MOMENTS.items():
        with pytest.MonkeyPatch.context() as patches:
            patch()
            full = merge()
        FILLER.unlink(missing_ok=True)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(production, "check_disk", partial(check_disk, spare_bytes=0))
            found[moment] = {"full": full, "again": merge()}
        clear()
    print(json.dumps(found))
