"""docs/python.md: functions for scripts, and every keyword with type, default and meaning, from the code itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import streamconv
from streamconv.cli import main

TARGET = Path(__file__).resolve().parent.parent / "docs" / "python.md"
MADE = "<!-- Made by tools/fix from streamconv and its command line; edits here are lost. -->"
FUNCTIONS: Mapping[str, str] = {
    "merge": "merge",
    "convert": "convert",
    "plan": "plan",
    "verify": "verify",
    "analyze": "analyze",
    "evaluate": "eval",
    "compare": "compare",
    "extract": "extract",
}
"""Functions, with the command whose options they have."""
RESULTS = ("Report", "Planned")
_IN_PYTHON: Mapping[str, str] = {
    "progress": "Draw a bar of the bytes that are done (tqdm's, in a notebook the notebook's).",
    "on_progress": "Called with bytes done and bytes in all: first with what an earlier run had done.",
    "on_download": "The same of what is fetched before.",
    "on_step": "Called with what is begun, in words.",
    "stop": "Set by another thread, or by a signal handler, to end at the next boundary.",
}


def page(text: str) -> str:
    """The text of docs/python.md with what is made made anew: all that follows the mark."""
    return f"{text.partition(MADE)[0]}{MADE}\n\n{_functions()}\n"


def _functions() -> str:
    shown: dict[tuple[str, str], str] = {}
    parts: list[str] = []
    for name, command in FUNCTIONS.items():
        function = getattr(streamconv, name)
        parts += [f"### streamconv.{name}", inspect.cleandoc(function.__doc__ or "")]
        rows, known = [], dict[str, list[str]]()
        for row in _rows(function, main.commands[command]):
            if row in shown:
                known.setdefault(shown[row], []).append(row[0])
            else:
                shown[row] = name
                rows.append(f"| {row[0]} | {row[1]} |")
        if rows:
            parts.append("\n".join(["| keyword | |", "|---|---|", *rows]))
        for other, names in known.items():
            parts.append(f"As for `{other}`: {', '.join(names)}.")
    for name in RESULTS:
        parts += [f"### streamconv.{name}", inspect.cleandoc(getattr(streamconv, name).__doc__ or "")]
    return "\n\n".join(parts)


def _rows(function: Callable[..., Any], command: click.Command) -> Iterator[tuple[str, str]]:
    helps = {str(param.name).removeprefix("no_"): _help(param) for param in command.params}
    for name, parameter in inspect.signature(function).parameters.items():
        has_default = parameter.default is not inspect.Parameter.empty and not callable(parameter.default)
        default = f" = {parameter.default!r}" if has_default else ""
        meaning = _IN_PYTHON.get(name) or helps.get(name) or _of_a_place(name)
        yield f"`{name}{default}`", meaning.replace("|", "\\|")


def _help(param: click.Parameter) -> str:
    """An option's help with keywords for options; of what is switched off by an option, said the other way round."""
    text = getattr(param, "help", None) or ""
    text = re.sub(r"--([a-z][a-z-]*)", lambda found: f"`{found[1].replace('-', '_')}`", text)
    text = text.replace("Repeatable", "Several: a list")
    return f"False: {text[:1].lower()}{text[1:]}" if str(param.name).startswith("no_") else text


def _of_a_place(name: str) -> str:
    return {"out": "Folder of the result.", "model": "The checkpoint: a folder or a Hub id."}[name]
