"""Lines of a journal: any that is not as it was written, and all behind it, count as not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from streamconv.output.journal_lines import (
    Progress,
    Watermark,
    encode_line,
    fingerprint_digest,
    read_lines,
)

START = fingerprint_digest({"quant": "keep"})
RECORDS: tuple[dict[str, Any], ...] = (
    {"watermark": "a", "offset": 4096, "sha256": "0a" * 32, "sums": {"w\n": [0.5, 1e-300, float("inf")]}},
    {"finished": "a", "sha256": "0b" * 32, "sums": {}},
    {"restart": "b"},
    {"publishing": True},
)


def written(path: Path, *records: object, start: str = START) -> list[bytes]:
    check, lines = start, []
    for record in records:
        line, check = encode_line(record, check)  # type: ignore[arg-type]  # some are no records
        lines.append(line)
    path.write_bytes(b"".join(lines))
    return lines


def test_what_was_written_is_read(tmp_path: Path) -> None:
    lines = written(tmp_path / "lines", *RECORDS)
    found = read_lines(tmp_path / "lines", START)
    assert found.progress == Progress(
        finished={"a": "0b" * 32},
        watermarks={"a": Watermark(4096, "0a" * 32)},
        sums={"w\n": [0.5, 1e-300, float("inf")]},
        publishing=True,
    )
    assert found.end == len(b"".join(lines))
    assert not found.has_more
    assert json.loads(lines[1])["sha256"] == "0b" * 32
    assert read_lines(tmp_path / "none", START).progress == Progress()


def test_any_flipped_bit_is_seen(tmp_path: Path) -> None:
    lines = written(tmp_path / "lines", *RECORDS)
    content, first = b"".join(lines), len(lines[0])
    for place in range(first, first + len(lines[1])):
        for bit in (1, 16):
            flipped = bytearray(content)
            flipped[place] ^= bit
            (tmp_path / "lines").write_bytes(flipped)
            found = read_lines(tmp_path / "lines", START)
            assert found.end == first, f"bit {bit} of byte {place}"
            assert not found.progress.finished


def test_lines_that_are_missing_twice_or_in_another_order_end_what_is_believed(tmp_path: Path) -> None:
    a, b, c, d = written(tmp_path / "lines", *RECORDS)
    for lines, good in (
        ((a, c, d), [a]),
        ((b, c, d), []),
        ((a, b, b, c), [a, b]),
        ((a, c, b, d), [a]),
        ((d,), []),
    ):
        (tmp_path / "lines").write_bytes(b"".join(lines))
        found = read_lines(tmp_path / "lines", START)
        assert found.end == len(b"".join(good))
        assert found.has_more


def test_lines_of_another_run_are_not_believed(tmp_path: Path) -> None:
    written(tmp_path / "lines", *RECORDS)
    found = read_lines(tmp_path / "lines", fingerprint_digest({"quant": "nf4"}))
    assert (found.progress, found.end, found.has_more) == (Progress(), 0, True)


@pytest.mark.parametrize(
    "record",
    [
        {"finished": "a", "sums": {}},
        {"finished": "a", "sha256": 3, "sums": {}},
        {"finished": "a", "sha256": "G" * 64, "sums": {}},
        {"finished": "a", "sha256": "a" * 65, "sums": {}},
        {"finished": ["a"], "sha256": "0a", "sums": {}},
        {"finished": "a", "sha256": "0a", "sums": []},
        {"finished": "a", "sha256": "0a", "sums": {"w": [1, 2]}},
        {"finished": "a", "sha256": "0a", "sums": {"w": [1, 2, True]}},
        {"finished": "a", "sha256": "0a", "sums": {"w": [1, 2, "3"]}},
        {"finished": "a", "sha256": "0a", "sums": {"w": {}}},
        {"finished": "a", "sha256": "0a", "sums": {}, "more": 1},
        {"watermark": "a", "offset": -1, "sha256": "0a", "sums": {}},
        {"watermark": "a", "offset": True, "sha256": "0a", "sums": {}},
        {"watermark": "a", "offset": 1.0, "sha256": "0a", "sums": {}},
        {"restart": None},
        {"publishing": False},
        {"rejected": 1},
        {"something": "else"},
        {},
    ],
    ids=str,
)
def test_a_line_that_says_nothing_sensible_is_not_believed_whatever_its_check(
    tmp_path: Path, record: object
) -> None:
    written(tmp_path / "lines", record, RECORDS[1])
    assert read_lines(tmp_path / "lines", START).progress == Progress()


def test_brackets_and_holes_without_end_cost_nothing(tmp_path: Path) -> None:
    deep = json.loads("[" * 500 + "]" * 500)
    written(tmp_path / "lines", {"finished": deep, "sha256": "0a", "sums": {}})
    assert read_lines(tmp_path / "lines", START).progress == Progress()
    (tmp_path / "lines").write_bytes(b"[" * 100_000)
    assert read_lines(tmp_path / "lines", START).end == 0
    with (tmp_path / "lines").open("wb") as file:
        os.truncate(file.fileno(), 2**43)
    found = read_lines(tmp_path / "lines", START)
    assert (found.progress, found.end, found.has_more) == (Progress(), 0, False)
