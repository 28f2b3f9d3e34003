"""Lines on standard output and standard error."""

from __future__ import annotations

import pytest

from streamconv.cli.printing import say


def test_what_would_steer_a_terminal_is_spelt_out(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b]0;title\x07\rb\u202ec\udcffd \u00e9\nnext", "last")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\\rb\\u202ec\\udcffd \u00e9\\nnext\nlast\n"


def test_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("no", err=True)
    assert capsys.readouterr() == ("", "no\n")
