"""Completion: the scripts that shells read, and values of options."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from streamconv.adapters.combinations import COMBINATIONS
from streamconv.cli import completion, main
from streamconv.cli.completion import COMBINE_NAMES, ROUNDING_NAMES, TRAINED_ON
from streamconv.cli.format_rows import read_rows
from streamconv.equalization import RESCALINGS
from streamconv.formats import FORMATS
from streamconv.rounding import ROUNDINGS
from tests.cli.calls import run, succeed


def completed(command: str, option: str, begun: str = "") -> list[str]:
    """What a shell would be offered for the value of an option."""
    with main.commands[command].make_context(command, [], resilient_parsing=True) as context:
        (found,) = (param for param in context.command.params if option in param.opts)
        return [str(item.value) for item in found.shell_complete(context, begun)]


def test_names_are_those_of_the_tables() -> None:
    assert sorted(ROUNDING_NAMES) == sorted(ROUNDINGS)
    assert list(TRAINED_ON) == [name for name, each in FORMATS.items() if each.load_in is not None]
    assert sorted(COMBINE_NAMES) == sorted(COMBINATIONS)
    assert completed("merge", "--rescale") == list(RESCALINGS)


def test_values_begin_as_what_was_typed() -> None:
    assert completed("merge", "--quant") == ["keep", "none", *FORMATS]
    assert completed("merge", "--quant", "gguf:q4_k") == ["gguf:q4_k", "gguf:q4_k_s", "gguf:q4_k_m"]
    assert completed("merge", "--quant", "NF4") == ["nf4", "nf4-dq"]
    assert completed("merge", "--merge-base", "o") == ["original"]
    assert completed("analyze", "--format", "b") == []
    assert completed("eval", "--dtype", "b") == ["bfloat16"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_asks_the_program_what_there_is(shell: str) -> None:
    script = succeed("completion", shell).stdout
    assert "_STREAMCONV_COMPLETE" in script
    assert "streamconv" in script


def test_bash_can_read_its_script(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(succeed("completion", "bash").stdout)
    subprocess.run(["bash", "-n", script], check=True)


def test_another_shell_is_refused() -> None:
    result = run("completion", "tcsh")
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr


def test_formats_are_listed_from_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported for it that takes time."""
    found = json.loads(succeed("formats", "--json").stdout)
    assert [row["name"] for row in found] == [row.name for row in read_rows()] == list(FORMATS)
