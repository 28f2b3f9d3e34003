"""Writes docs/cli.md from the commands, the table of docs/adapters.md from the methods, that of docs/formats.md from
the formats and what `tools/foreign` found, docs/architectures.md and the tables of docs/reliability.md from the
results that they show, docs/python.md from the functions; --check says whether they are up to date.
"""

import inspect
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from streamconv import errors
from streamconv.adapters import ADAPTERS
from streamconv.adapters.base import UpdateAccess
from streamconv.adapters.method import Method
from streamconv.cli import main as streamconv
from streamconv.cli.blocks import sections
from tests.contracts.updates import FORMS, Form, drawn
from tests.mirror import STORIES
from tools import architecture_page, format_page, python_page, reliability_page

DOCS = Path(__file__).resolve().parent.parent / "docs"
TARGET = DOCS / "cli.md"
METHODS = DOCS / "adapters.md"
PINS = DOCS.parent / "tools" / "constraints.txt"
HEAD = "<!-- Made by tools/fix from streamconv/cli; edits here are lost. -->"
TABLE = "<!-- Made by tools/fix from ADAPTERS and tests/contracts/updates.py; edits here are lost. -->"
END = "<!-- End of what is made. -->"
CONVOLUTIONS = (3, 4, 5)  # axes of their weights


def page() -> str:
    """The whole of docs/cli.md. A table that an earlier command has, too, is not repeated."""
    lines = ["# Command line", "", HEAD, "", *_text(streamconv)]
    shown: dict[str, str] = {}
    for name, command in streamconv.commands.items():
        arguments = [
            param.metavar or str(param.name).upper()
            for param in command.params
            if isinstance(param, click.Argument)
        ]
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
        "0: done. 1: a bug, with its traceback. 129, 130, 143: `Stopped` by a signal; give the command again.",
        "",
    )
    yield from ("| code | exception | when |", "|--:|---|---|")
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.StreamconvError) and error.exit_code != 1:
            yield f"| {error.exit_code} | `{error.__name__}` | {inspect.getdoc(error)} |"
    yield from ("", "All derive from `StreamconvError`, those with code 3 from `InputError`.")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("  [", " [")


def methods_page(text: str) -> str:
    """The text of docs/adapters.md with its table of methods made anew."""
    before, _, rest = text.partition(TABLE)
    _, _, after = rest.partition(END)
    return f"{before}{TABLE}\n\n{methods_table()}\n\n{END}{after}"


def methods_table() -> str:
    """A row for each method: what its files hold, what it computes, and which tests compare it with PEFT."""
    against = re.search(r"^peft==(.*)$", PINS.read_text(), re.MULTILINE)
    version = against[1] if against else ""
    rows = [
        f"| method | `peft_type` | tensors | merged weight | layers | access | tested against PEFT {version} in |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in ADAPTERS.items():
        forms = {key: form for key, form in FORMS.items() if form.config["peft_type"] == name}
        missing = set(map(_layer, forms, forms.values())) - {*method.layers}
        if missing:
            raise ValueError(f"{name}: `layers` lacks {', '.join(sorted(missing))}, of which there is a form")
        cells = (
            method.label,
            f"`{name}`",
            _tensors(method, forms),
            method.formula,
            ", ".join(method.layers),
            _access(forms),
            _tests(method),
        )
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(rows)


def _layer(name: str, form: Form) -> str:
    """The kind of layer that a form of the contract is for, by its name or by its weight."""
    weight = next(iter(form.weights.values()))
    found = {"experts": "experts", "conv1d": "Conv1D", "embedding": "Embedding", "rows": "Embedding"}
    for word, layer in found.items():
        if word in name:
            return layer
    if len(weight) == 1:
        return "norms"
    return "convolutions" if len(weight) in CONVOLUTIONS else "Linear"


def _tensors(method: Method, forms: Mapping[str, Form]) -> str:
    """Names below a module's path, and those that belong to all modules, as the forms' files have them."""
    own = re.compile(rf"(?:^|\.)((?:{method.keys}|{method.shared or method.keys})(?:\.\w+)*)$")
    found = [match[1] for form in forms.values() for key in form.tensors if (match := own.search(key))]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(found))


def _access(forms: Mapping[str, Form]) -> str:
    """How updates read a weight, that of most forms first; of the others, which."""
    found: dict[UpdateAccess, list[str]] = defaultdict(list)
    for name, form in forms.items():
        with tempfile.TemporaryDirectory() as folder:
            form.write(Path(folder), drawn(form.tensors, 1))
            accesses = [update.access for update in form.read(Path(folder)).updates]
        found[max(accesses, key=[*UpdateAccess].index)].append(name)
    usual, *others = found
    return "; ".join([usual, *(f"{access}: {', '.join(found[access])}" for access in others)])


def _tests(method: Method) -> str:
    """Test files of the module that reads the method."""
    module = method.read.__module__.removeprefix("streamconv.").replace(".", "/")
    room, _, name = module.rpartition("/")
    files = STORIES.get(f"{module}.py", [f"{room}/test_{name}.py"])
    return ", ".join(f"`tests/{file}`" for file in files)


def main() -> int:
    made = {
        TARGET: page(),
        METHODS: methods_page(METHODS.read_text()),
        format_page.KNOWN: format_page.known_text(),
        format_page.TARGET: format_page.page(format_page.TARGET.read_text()),
        architecture_page.TARGET: architecture_page.page(),
        python_page.TARGET: python_page.page(python_page.TARGET.read_text()),
        reliability_page.TARGET: reliability_page.page(reliability_page.TARGET.read_text()),
    }
    old = [file for file, text in made.items() if not file.exists() or file.read_text() != text]
    if "--check" not in sys.argv:
        for file in old:
            file.write_text(made[file])
        return 0
    for file in old:
        print(f"{file.relative_to(file.parent.parent)} is not up to date; run tools/fix", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
