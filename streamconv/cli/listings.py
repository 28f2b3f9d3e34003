"""`inspect` and `formats`: what is there."""

from __future__ import annotations

import json
from typing import Any

import click

from streamconv.cli.blocks import Command, Section, group, option
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
    """List the formats that can be read and written, and which calibration text can be used for."""
    from streamconv.formats import FORMATS
    from streamconv.planning.choices import can_calibrate

    rows = [
        {
            "name": fmt.name,
            "bits_per_weight": fmt.bits_per_weight,
            "calibration": False,
            "takes_calibration": can_calibrate(fmt),
            "loaders": fmt.loaders,
        }
        for fmt in FORMATS.values()
    ]
    if as_json:
        answer(*json.dumps(rows, indent=1).splitlines())
        return
    answer(f"{'name':10} {'bits/weight':>11}  {'calibration':11}  opened by")
    for row in rows:
        use = "if given" if row["takes_calibration"] else "not used"
        answer(f"{row['name']:10} {row['bits_per_weight']:11.3f}  {use:11}  {row['loaders']}")
