"""Inputs that do harm are refused while planning: by exit code and sentence, in seconds, without memory of their own.

`tools/hostile` runs the same and writes the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.forward.texts import write_text
from tests.hostile import stranger
from tests.hostile.commands import Commands
from tests.hostile.hostile_rows import rows, run
from tests.hostile.stranger import LONGEST

ROWS = {row.name: row for row in rows()}
MOST_SECONDS = 5
MOST_BYTES = 500_000_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = stranger.fill(tmp_path_factory.mktemp("inputs"))
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def servers(commands: Commands, model_commands: Commands) -> Mapping[bool, Commands]:
    """By whether a run needs libraries that run models."""
    return {False: commands, True: model_commands}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused(name: str, inputs: Path, tmp_path: Path, servers: Mapping[bool, Commands]) -> None:
    row = ROWS[name]
    found = run(row, inputs, tmp_path / "row", servers)
    assert found.code == row.code, found.text
    for words in row.says:
        assert words in found.text
    if row.code:
        last = found.text.strip().splitlines()[-1]
        assert last.startswith("Error: ")
        assert last.isprintable()
        assert len(last) < LONGEST
    assert "Traceback" not in found.text
    assert found.cpu_seconds < MOST_SECONDS
    assert found.grown_bytes < MOST_BYTES
    assert not any((tmp_path / "row" / "out").glob("*.safetensors"))


def test_the_good_inputs_are_good(inputs: Path, tmp_path: Path, servers: Mapping[bool, Commands]) -> None:
    """Before they are spoilt: the commands that rows have end well."""
    good = {
        (row.base, row.command): replace(row, edit=lambda _: None)
        for row in rows()
        if row.code == 3 and not {"--allow-pickle", "{folder}/lines.jsonl"} & {*row.command}
    }
    for number, row in enumerate(good.values()):
        found = run(row, inputs, tmp_path / str(number), servers)
        assert found.code == 0, f"{row.base} {row.command}: {found.text}"


def test_they_are_many() -> None:
    assert len(ROWS) == len(list(rows())) >= 250
