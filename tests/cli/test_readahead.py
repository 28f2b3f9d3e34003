"""The guess at what will be read first: the shards in order, so much of them, and never an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamconv.cli import readahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and bytes asked for; advice is given at once, in this thread."""
    asked: list[tuple[str, int]] = []

    def noting(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, advice) == (0, os.POSIX_FADV_WILLNEED)
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, length))

    monkeypatch.setattr(os, "posix_fadvise", noting)
    return asked


def test_the_first_shards_are_asked_for_up_to_a_limit(
    tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (3, 1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(100))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 150)
    readahead._advise(tmp_path)
    assert asked == [("model-1.safetensors", 100), ("model-2.safetensors", 50)]


@pytest.mark.parametrize("base", ["org/model", "", "nothing\0here", "{folder}/a.safetensors"])
def test_what_cannot_be_read_is_left_to_others(
    tmp_path: Path, asked: list[tuple[str, int]], base: str
) -> None:
    (tmp_path / "a.safetensors").symlink_to("gone")
    readahead._advise(Path(base.format(folder=tmp_path)))
    readahead._advise(tmp_path)
    assert asked == []


def test_a_fifo_in_the_place_of_a_shard_is_not_waited_for(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    readahead._advise(tmp_path)
    assert asked == [("model.safetensors", 0)]


def test_it_does_not_hold_the_command_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(readahead, "_advise", started.append)
    readahead.read_ahead(str(tmp_path))
    while not started:
        pass
    assert started == [tmp_path]
