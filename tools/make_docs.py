"""Writes docs/cli.md from the commands themselves, and docs/architectures.md from the results that it shows.

With --check, says whether they are up to date.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from streamconv import errors
from streamconv.cli import main as streamconv
from streamconv.cli.blocks import sections
from tools import architecture_page

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = "<!-- Made by tools/fix from streamconv/cli; edits here are lost. -->"


def page() -> str:
    """The whole of docs/cli.md. A table that an earlier command has, too, is not repeated."""
    lines = ["# Command line", "", HEAD, "", *_text(streamconv)]
    shown: dict[str, str] = {}
    for name, command in streamconv.commands.items():
        arguments = [param.name.upper() for param in command.params if isinstance(param, click.Argument)]
        lines += [f"## {' '.join(['streamconv', name, *arguments])}", "", *_text(command)]
        repeated: dict[str, list[str]] = {}
        for title, table in _tables(command).items():
            if table in shown:
                repeated.setdefault(shown[table], []).append(title)
            else:
                shown[table] = name
                lines += [table, ""]
        for earlier, titles in repeated.items():
            lines += [f"{', '.join(titles)}: as for `streamconv {earlier}`.", ""]
    lines += ["## Exit codes", "", *_exit_codes()]
    return "\n".join(lines).rstrip() + "\n"


def _text(command: click.Command) -> Iterator[str]:
    r"""Help as paragraphs; one that begins with `\b`, which click leaves as it is, holds examples."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield from ("```sh", paragraph.removeprefix("\b\n"), "```", "")
        else:
            yield from (paragraph, "")


def _tables(command: click.Command) -> Mapping[str, str]:
    """A table of options for each heading."""
    tables = {}
    with command.make_context(command.name, [], resilient_parsing=True) as context:
        for title, records in sections(command, context).items():
            rows = (
                f"| `{_cell(option)}` | {_cell(meaning)} |"
                for option, meaning in records
                if "--help" not in option
            )
            tables[title] = "\n".join([f"| {title} | |", "|---|---|", *rows])
    return tables


def _exit_codes() -> Iterator[str]:
    yield from (
        "0: done. 1: a bug, with its traceback. 130, 143: `Stopped` by a signal; give the command again.",
        "",
    )
    yield from ("| code | exception | when |", "|--:|---|---|")
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.StreamconvError) and error.exit_code != 1:
            yield f"| {error.exit_code} | `{error.__name__}` | {inspect.getdoc(error)} |"
    yield from ("", "All derive from `StreamconvError`, those with code 3 from `InputError`.")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("  [", " [")


def main() -> int:
    pages = {TARGET: page(), architecture_page.TARGET: architecture_page.page()}
    if "--check" not in sys.argv:
        for target, text in pages.items():
            target.write_text(text)
        return 0
    old = [target for target, text in pages.items() if not target.exists() or target.read_text() != text]
    for target in old:
        print(f"{target.relative_to(target.parent.parent)} is not up to date; run tools/fix", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
