"""How far a run is, on a terminal and in a log."""

from __future__ import annotations

import json
import os
import pty
import sys
import termios
from pathlib import Path

import pytest

import streamconv
from streamconv.cli import main
from streamconv.cli.progress import JsonLines, progress
from streamconv.progress import Turn
from tests.cli.calls import Inputs, succeed


def test_off_a_terminal_progress_is_plain_lines(inputs: Inputs, tmp_path: Path) -> None:
    result = succeed("merge", *inputs.options, "-o", tmp_path / "out")
    assert result.stderr.startswith("merge: ")
    assert result.stderr.endswith(" s left\n")
    assert result.stderr.count("\n") == 1
    assert "\r" not in result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out'}: ")


def test_on_a_terminal_progress_is_a_bar(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        main(["convert", "--base", str(inputs.base), "-o", str(tmp_path / "out")], standalone_mode=False)
        terminal.flush()
        os.write(theirs, b"END")
        seen = b""
        while not seen.endswith(b"END"):
            seen += os.read(ours, 4096)
    os.close(ours)
    assert b"\rconvert: 100%" in seen
    assert b"B/s]" in seen


def test_speed_is_that_of_this_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier run had done counts as done, not as done in no time."""
    clock = iter([100.0, 100.0, 110.0, 135.0, 150.0])
    monkeypatch.setattr("streamconv.cli.progress.time.monotonic", lambda: next(clock))
    with progress("merge", quiet=False) as tell:
        for done in (7000, 7100, 7350, 8000):
            tell(done, 8000)
    assert capsys.readouterr().err.splitlines() == [
        "merge: 7.35 kB of 8 kB, 10 B/s, 65 s left",
        "merge: 8 kB of 8 kB, 20 B/s, 0 s left",
    ]


def test_progress_begins_with_nothing_and_ends_with_all(inputs: Inputs, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = streamconv.convert(inputs.base, tmp_path / "out", on_progress=lambda *told: seen.append(told))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.bytes_written}
    # Headers are there before the first tensor.
    assert 0 < seen[0][0] < 0.5 * report.bytes_written
    assert seen[-1][0] == report.bytes_written
    for base in (None, inputs.base):
        seen.clear()
        streamconv.verify(
            tmp_path / "out", full=bool(base), base=base, on_progress=lambda *told: seen.append(told)
        )
        assert seen == sorted(seen)
        assert (seen[0][0], seen[-1][0]) == (0, seen[0][1])


def test_that_all_is_done_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Some go on to say so: an evaluation, while it makes greedy continuations."""
    with progress("eval", quiet=False) as tell:
        for done in (0, 8000, 8000, 8000):
            tell(done, 8000)
    assert len(capsys.readouterr().err.splitlines()) == 1


KEYS = {
    *(
        "time",
        "event",
        "phase",
        "file",
        "file_bytes",
        "done_bytes",
        "total_bytes",
        "bytes_per_second",
        "eta_seconds",
    ),
}


def test_lines_of_json_tell_of_each_phase_and_file(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = succeed(
        "merge", *inputs.options, "-o", out, "--json-progress", "--max-shard-size", "20kB", "--json"
    )
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert all(line.keys() == KEYS for line in lines)
    assert [line["phase"] for line in lines if line["event"] == "phase"] == [
        "plan",
        "open",
        "write",
        "publish",
        "done",
    ]
    made = {line["file"]: line["file_bytes"] for line in lines if line["event"] == "file"}
    assert made == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert len(made) > 1
    assert lines[-1]["done_bytes"] == lines[-1]["total_bytes"] == sum(made.values())
    assert [line["done_bytes"] or 0 for line in lines] == sorted(line["done_bytes"] or 0 for line in lines)
    report = json.loads(result.stdout)
    assert report["shards"].keys() == made.keys()


def test_lines_of_json_between_turns_are_some_seconds_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("streamconv.cli.progress.time.monotonic", lambda: now)
    lines = JsonLines()
    lines.turn(Turn("write"))
    for tick in range(41):
        now = 100.0 + tick / 4
        lines.progress(1000 + 10 * tick, 2000)
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in told] == ["phase", "progress", "progress"]
    assert told[0]["total_bytes"] is told[0]["bytes_per_second"] is told[0]["eta_seconds"] is None
    # What was there when it began is not what it has done.
    assert [(line["done_bytes"], line["bytes_per_second"], line["eta_seconds"]) for line in told[1:]] == [
        (1200, 40, 20.0),
        (1400, 40, 15.0),
    ]
