"""Exit codes and error lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from streamconv.errors import OptionError
from tests.cli.calls import Inputs, run


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (2, ["--quant", "nf5"]),
        (2, ["--max-ram", "5"]),
        (2, ["--min-kept", "1.5"]),
        (2, ["--out", ""]),
        (3, ["--base", "/nowhere"]),
        (4, ["--out", "/proc/nowhere"]),
        (5, ["--max-ram", "64MB"]),
    ],
    ids=str,
)
def test_exit_codes(inputs: Inputs, tmp_path: Path, code: int, options: list[str]) -> None:
    result = run("merge", *inputs.options, "--out", tmp_path / "out", "--json", *options)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("env", [None, {"STREAMCONV_DEBUG": "1"}], ids=["option", "environment"])
def test_debug_lets_the_error_through(inputs: Inputs, env: Mapping[str, str] | None) -> None:
    result = run("plan", *inputs.options, "--quant", "nf5", *([] if env else ["--debug"]), env=env)
    assert isinstance(result.exception, OptionError)
