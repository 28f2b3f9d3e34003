"""The names people write in their scripts: they exist, are documented, and mean what the command line's do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from os import PathLike
from typing import Any

import click
import pytest

import streamconv
from streamconv import errors
from streamconv.cli import main
from streamconv.errors import StreamconvError
from streamconv.pipeline import merge_options
from streamconv.planning.options import MergeOptions
from streamconv.sizes import parse_size

# Options that are no keywords: what they do is done otherwise in Python.
PUSHING = {
    "push_to",
    "private",
    "create_pr",
    "commit_message",
    "push_revision",
}  # streamconv.push, afterwards
ONLY_ON_THE_COMMAND_LINE = {
    "json_progress",
    "dry_run",
    "recipe",
    "print_recipe",
    "as_json",
    "quiet",
    "verbose",
    "debug",
    "list",
    "places",
    *PUSHING,
}
ONLY_IN_PYTHON = {"progress", "on_progress", "on_download", "on_step"}


def test_every_name_resolves_and_is_listed_once() -> None:
    assert len(set(streamconv.__all__)) == len(streamconv.__all__)
    assert list(streamconv.__all__) == sorted(streamconv.__all__)
    for name in streamconv.__all__:
        assert getattr(streamconv, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        streamconv.marge  # noqa: B018


def test_a_star_import_gets_just_these() -> None:
    names: dict[str, Any] = {}
    exec("from streamconv import *", names)
    assert set(names) - {"__builtins__"} == set(streamconv.__all__)


def test_all_errors_are_public_and_have_a_code() -> None:
    found = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert found <= set(streamconv.__all__)
    for name in found - {"Stopped"}:
        error = getattr(errors, name)
        assert issubclass(error, StreamconvError)
        assert isinstance(error.exit_code, int)


@pytest.mark.parametrize("name", streamconv.__all__)
def test_every_name_is_documented(name: str) -> None:
    documented = inspect.getdoc(getattr(streamconv, name)) or ""
    assert documented.endswith("."), name


def test_names_are_completed_and_the_version_is_told() -> None:
    assert set(dir(streamconv)) == {*streamconv.__all__, "__version__"}
    assert streamconv.__version__ == version("streamconv")


def test_importing_the_package_takes_no_time() -> None:
    script = "import sys, streamconv; print(*sorted({'torch', 'numpy', 'click'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
        == "\n"
    )


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def options(command: str) -> dict[str, click.Parameter]:
    """By their name in Python. What is refused with --no-… is a keyword without the no."""
    return {str(param.name).removeprefix("no_"): param for param in main.commands[command].params}


COMMANDS: dict[str, Callable[..., Any]] = {
    "merge": streamconv.merge,
    "convert": streamconv.convert,
    "plan": streamconv.plan,
    "verify": streamconv.verify,
    "eval": streamconv.evaluate,
    "analyze": streamconv.analyze,
    "compare": streamconv.compare,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_keywords_are_the_options(command: str) -> None:
    wanted = set(options(command)) - ONLY_ON_THE_COMMAND_LINE
    assert set(keywords(COMMANDS[command])) - ONLY_IN_PYTHON == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_agree(command: str) -> None:
    """A command with nothing but its folders gives what the function's own defaults are."""
    required = [
        text
        for param in main.commands[command].params
        if param.required
        for text in ([param.opts[0], "folder"] if isinstance(param, click.Option) else ["folder"])
    ]
    given = main.commands[command].make_context(command, required).params
    given["resume"] = not given.pop("no_resume", False)
    for name, parameter in keywords(COMMANDS[command]).items():
        if name in ONLY_IN_PYTHON:
            continue
        if parameter.default is inspect.Parameter.empty:
            # A base may be left out: on the command line in silence, in Python as None.
            may_be_none = "None" in str(parameter.annotation)
            assert given[name] == "folder" or (given[name] is None and may_be_none)
        elif name in ("max_ram", "max_vram"):
            assert parse_size(parameter.default) == given[name]
        else:
            assert parameter.default == given[name], name


@pytest.mark.parametrize("command", COMMANDS)
def test_everything_but_the_folders_is_given_by_name(command: str) -> None:
    for name, parameter in keywords(COMMANDS[command]).items():
        positional = name == "model" or (
            name in ("base", "adapter", "out") and parameter.default is inspect.Parameter.empty
        )
        positional |= (command, name) == ("plan", "adapter")  # which is `convert`'s plan without it
        assert (parameter.kind is parameter.POSITIONAL_OR_KEYWORD) == positional, name


@pytest.mark.parametrize("function", [*COMMANDS.values(), streamconv.inspect])
def test_folders_may_be_paths(function: Callable[..., Any]) -> None:
    hints = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
    }
    places = {"model", "data", "reference", "base", "adapter", "out", "location", "report", "calibration"}
    if function is streamconv.compare:
        places.remove("reference")  # T or F
    for name in places & hints.keys():
        assert PathLike[str] in hints[name].__args__, name


def test_defaults_of_the_options_are_those_of_the_plan() -> None:
    """Where neither command line nor keyword says anything."""
    given = {
        name: parameter.default
        for name, parameter in keywords(streamconv.merge).items()
        if name in keywords(merge_options)
    }
    assert merge_options(**given) == MergeOptions()
