"""`inspect` and `formats`: what is there."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from streamconv.cli.blocks import Command, Section, group, option
from streamconv.cli.format_rows import read_rows
from streamconv.cli.options import ALLOW_PICKLE, DEBUG, FOLDER, JSON
from streamconv.cli.printing import answer
from streamconv.sizes import format_size


@click.command("inspect", cls=Command)
@click.argument("path", type=FOLDER)
@group(
    option(
        Section.INPUTS, "--revision", metavar="REV", help="Branch, tag or commit of a Hub id. Default: main."
    ),
    ALLOW_PICKLE,
    JSON,
    DEBUG,
)
def inspect_command(path: str, revision: str | None, allow_pickle: bool, as_json: bool) -> None:
    """Show what a checkpoint or adapter holds: a folder, or a Hub id, of which headers are enough."""
    from streamconv.pipeline.inspection import inspect

    found = inspect(path, revision=revision, allow_pickle=allow_pickle)
    if as_json:
        answer(*json.dumps(found, indent=1).splitlines())
        return
    for key, value in found.items():
        answer(f"{key.replace('_', ' '):16} {_fact(key, value)}")


def _fact(key: str, value: Any) -> str:
    match key:
        case "shards":
            first = ", ".join(f"{shard['name']} ({format_size(shard['bytes'])})" for shard in value[:4])
            return f"{len(value)}: {first}"
        case "weights":
            return ", ".join(f"{n['count']} {name} ({format_size(n['bytes'])})" for name, n in value.items())
        case "bytes":
            return format_size(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


@click.command("formats", cls=Command)
@JSON
def formats_command(as_json: bool) -> None:
    """List the formats: how they are stored, what can be done with them, and which programs opened them."""
    rows = read_rows()
    if as_json:
        answer(*json.dumps([asdict(row) for row in rows], indent=1).splitlines())
        return
    table = [("name", "bits/weight", "can", "roundings", "stored as", "opened by")]
    table += [
        (row.name, f"{row.bits_per_weight:.3f}", row.uses, row.chosen_by, row.layout, row.loaders)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        answer("  ".join(padded).rstrip())
