"""Help, and how soon it comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from streamconv.__main__ import set_allocator
from streamconv.cli import main
from tests.cli.calls import succeed

COMMANDS = (
    "merge",
    "convert",
    "plan",
    "inspect",
    "verify",
    "analyze",
    "eval",
    "compare",
    "extract",
    "push",
    "formats",
    "completion",
)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(command: list[str]) -> None:
    result = succeed(*command, "--help")
    assert result.stdout.startswith(f"Usage: main {' '.join(command)}".strip())
    assert result.stdout == succeed(*command, "-h").stdout


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    listed = succeed("--help").stdout.partition("Commands:")[2]
    assert [
        line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "
    ] == list(COMMANDS)


def test_every_option_says_what_it_does() -> None:
    for name, command in main.commands.items():
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{name} {param.opts}"
                assert param.help.endswith("."), f"{name} {param.opts}"


def test_help_groups_options_and_forgets_none() -> None:
    text = succeed("merge", "--help").stdout
    for heading in ("Inputs and output:", "Result:", "Merge:", "Resources:", "Output folder:", "Messages:"):
        assert text.count(heading) == 1
    assert text.index("Most used:") < text.index("Inputs and output:")
    assert "[BASE ADAPTER OUT]" in text
    for param in main.commands["merge"].params:
        if isinstance(param, click.Argument):
            continue
        assert f"{param.opts[-1]} " in text or f"{param.opts[-1]}," in text, param.opts


@pytest.mark.parametrize(
    "arguments",
    ["--help", "merge --help", "--version", "merge --qunat nf4", "mrege", "merge --recipe nowhere.yaml"],
)
def test_it_answers_without_loading_what_takes_seconds(arguments: str) -> None:
    heavy = ("torch", "numpy", "bitsandbytes", "huggingface_hub", "transformers", "safetensors", "tqdm")
    script = (
        "import sys\nfrom streamconv.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        f"finally:\n    print('LOADED', *sorted(set(sys.modules) & {set(heavy)!r}))\n"
    )
    line = [sys.executable, "-c", script, *arguments.split()]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1] == "LOADED"


def test_version() -> None:
    assert succeed("--version").stdout.startswith("streamconv 0.1.0 (Python 3.")


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os; os.rmdir({str(gone)!r}); from streamconv.__main__ import main; main()"
    line = [sys.executable, "-c", script, "--version"]
    ended = subprocess.run(line, cwd=gone, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("Error: the folder in which this was started is not there any more")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_gpus_grows_in_one_piece_unless_somebody_said_how(name: str) -> None:
    environment: dict[str, str] = {}
    set_allocator(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = {name: "max_split_size_mb:512"}
    set_allocator(environment)
    assert environment == {name: "max_split_size_mb:512"}
