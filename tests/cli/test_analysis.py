"""`streamconv analyze`: what it prints, and with which codes it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.calls import Inputs, run, succeed
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=72, layers=2, vocabulary=50)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("analyzed")
    base = write_base(folder / "base", SIZES.shapes)
    return Inputs(base, write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "down_proj")))


def test_tables_and_advice(models: Inputs, tmp_path: Path) -> None:
    result = succeed("analyze", *models.options, "--format", "nf4", "--report", tmp_path / "plots")
    lines = result.stdout.splitlines()
    assert lines[0] == "F: the update is added to the original 16-bit base"
    assert any(line.startswith("T: the base is first rounded to nf4-dq") for line in lines)
    for target in ("F", "T"):
        first = lines.index(next(line for line in lines if line.startswith(f"nf4 of {target}")))
        table = lines[first : first + 4]
        assert len({len(line) for line in table}) == 1
        assert [line.split()[0] for line in table[1:]] == ["q_proj", "down_proj", "all"]
        assert re.search(r"\d+%\.\.\d+%", table[1])
    assert sum(line.startswith("* ") for line in lines) == 3
    assert sum(line.startswith("drew ") for line in lines) == 3
    assert lines[-1].startswith("read ")


def test_json_has_every_weight(models: Inputs) -> None:
    arguments = ("analyze", *models.options, "--layers", "1", "--format", "int8", "--merge-base", "original")
    found = json.loads(succeed(*arguments, "--json").stdout)
    assert [weight["layer"] for weight in found["weights"]] == [1, 1]
    assert list(found["total"]) == list(found["kinds"]["q_proj"]) == ["F"]
    assert list(found["total"]["F"]["formats"]["int8"]["roundings"]) == ["nearest", "stochastic", "search"]


def test_quiet_says_nothing(models: Inputs) -> None:
    result = succeed("analyze", *models.options, "--layers", "0", "--format", "nf4", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "q4"], 2, "--format q4 is not known"),
        (
            ["--layers", "5"],
            2,
            "--layers 5 names no layer that the adapter updates; it updates layers 0 to 1",
        ),
        (["--max-ram", "64MiB"], 5, "--max-ram is too small"),
        (["--merge-base", "q4"], 2, "--merge-base q4"),
    ],
)
def test_what_cannot_be_done(models: Inputs, arguments: list[str], code: int, message: str) -> None:
    result = run("analyze", *models.options, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_layers_that_are_no_numbers(models: Inputs) -> None:
    result = run("analyze", *models.options, "--layers", "0,x")
    assert (result.exit_code, "'0,x' is not a list of numbers such as 0,10,20" in result.stderr) == (2, True)
