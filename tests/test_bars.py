"""Bars for Python: bytes that an earlier run had done are not counted as this one's, and callbacks are told as well."""

from __future__ import annotations

import pytest

from streamconv.bars import bar


def test_a_bar_shows_bytes_and_tells_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    with bar("merge", True, lambda done, total: told.append((done, total))) as on_progress:
        on_progress(500, 2000)
        on_progress(2000, 2000)
    assert told == [(500, 2000), (2000, 2000)]
    shown = capsys.readouterr().err
    assert "merge: 100%" in shown
    assert "2.00k/2.00k" in shown


def test_without_one_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    with bar("merge", False, lambda done, total: told.append(done + total)) as on_progress:
        on_progress(1, 2)
    assert told == [3]
    assert capsys.readouterr() == ("", "")
