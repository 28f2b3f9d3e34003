"""Fills the disk under FOLDER in several ways; prints what happened as JSON. Run by test_full_disk.py.

A process of its own, because only that one may see the tiny file system mounted at FOLDER.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from streamconv.checkpoint.writer import ShardWriter, write_file
from streamconv.errors import StreamconvError
from tests.checkpoint.no_reservation import without_reservation

HEADER = b"header"
MIB = 1 << 20
PIECE = os.urandom(MIB // 4)


def outcome(attempt: Callable[[], object]) -> list[str]:
    """Class and message of the error that `attempt` ends with."""
    try:
        attempt()
    except StreamconvError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def too_large_to_begin(folder: Path) -> dict[str, object]:
    found = outcome(lambda: ShardWriter.create(folder / "a", HEADER, 20 * MIB))
    return {"create": found, "left": os.listdir(folder)}


def small_file_beside_a_reserved_shard(folder: Path) -> dict[str, object]:
    """The reservation holds: others run out of space, the shard does not."""
    write_file(folder / "config.json", b"old")
    statistics = os.statvfs(folder)
    size = statistics.f_bavail * statistics.f_frsize
    with ShardWriter.create(folder / "a", HEADER, size) as writer:
        found = outcome(lambda: write_file(folder / "config.json", PIECE))
        writer.write(bytes(size - len(HEADER)))
        writer.finish()
    return {"small": found, "kept": (folder / "config.json").read_text(), "left": sorted(os.listdir(folder))}


def filled_while_writing_then_resumed(folder: Path) -> dict[str, object]:
    """Without reservation, as on NFSv3: another takes the space; freed, the shard goes on and is whole."""
    vars(ctypes)["CDLL"] = without_reservation
    size = len(HEADER) + 12 * len(PIECE)
    with ShardWriter.create(folder / "a", HEADER, size) as writer:
        for _ in range(4):
            writer.write(PIECE)
        offset, digest = writer.offset, writer.sync()
        (folder / "other").write_bytes(bytes(2 * MIB))
        found = outcome(lambda: writer.write(8 * PIECE))
    (folder / "other").unlink()
    resumed = ShardWriter.resume(folder / "a", HEADER, size, offset, digest)
    assert resumed is not None
    with resumed:
        for _ in range(8):
            resumed.write(PIECE)
        finished = resumed.finish()
    expected = hashlib.sha256(HEADER + 12 * PIECE).hexdigest()
    return {"write": found, "whole": finished == expected, "left": os.listdir(folder)}


SCENARIOS = (too_large_to_begin, small_file_beside_a_reserved_shard, filled_while_writing_then_resumed)


def main() -> None:
    folder = Path(sys.argv[1])
    found: dict[str, object] = {}
    for scenario in SCENARIOS:
        found[scenario.__name__] = scenario(folder)
        for path in folder.iterdir():
            path.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
