"""Any part of a file is hashed as its bytes in memory are, and no more than is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from streamconv.storage import hashing
from streamconv.storage.hashing import hash_range

CONTENT = bytes(range(256)) * 9


@pytest.mark.parametrize("chunk", [1000, len(CONTENT), 10**6])
@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 2304), (7, 2000), (300, 9999), (5, 5), (2304, None)]
)
def test_parts_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, start: int, stop: int | None
) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", chunk)
    (tmp_path / "a").write_bytes(CONTENT)
    digest, told = hashlib.sha256(), list[int]()
    with (tmp_path / "a").open("rb") as file:
        end = hash_range(digest, file.fileno(), start, stop, told.append)
    wanted = CONTENT[start:stop]
    assert digest.digest() == hashlib.sha256(wanted).digest()
    assert (end, sum(told)) == (start + len(wanted), len(wanted))
