"""Facts on every format, as `streamconv formats` and docs/formats.md show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.formats import FORMATS
from streamconv.formats.base import Format
from streamconv.planning.choices import can_calibrate
from streamconv.rounding import ROUNDINGS

OPENED = "opened.json"


@dataclass(frozen=True, slots=True)
class FormatRow:
    """A format's entry. `opened`: programs with their versions that opened files of it when `tools/foreign` ran them;
    `documented`: others that open it by their documentation.
    """

    name: str
    bits_per_weight: float
    roundings: tuple[str, ...]
    takes_calibration: bool
    layout: str
    opened: tuple[str, ...]
    documented: tuple[str, ...]

    @property
    def uses(self) -> str:
        """Words for each thing that can be done with it. A base that has it can keep it, codes and scales included."""
        return "read, write, keep"

    @property
    def chosen_by(self) -> str:
        """Its roundings, in words as few as possible."""
        missing = [name for name in ROUNDINGS if name not in self.roundings]
        if not self.roundings:
            return "-"
        return f"all but {', '.join(missing)}" if missing else "all"

    @property
    def loaders(self) -> str:
        """Programs that open it, in words."""
        documented = f"documented: {', '.join(self.documented)}" if self.documented else ""
        return "; ".join(filter(None, (", ".join(self.opened), documented)))


def read_opened() -> Mapping[str, Sequence[str]]:
    """Programs that opened a format's files, by its name; `tools/fix` writes the file from docs/results."""
    found: Mapping[str, Sequence[str]] = json.loads(Path(__file__).with_name(OPENED).read_text("utf-8"))
    return found


def format_rows(opened: Mapping[str, Sequence[str]]) -> tuple[FormatRow, ...]:
    """A row for each entry of FORMATS, in their order."""
    return tuple(_row(each, tuple(opened.get(each.name, ()))) for each in FORMATS.values())


def _row(storage_format: Format, opened: tuple[str, ...]) -> FormatRow:
    calibrates = can_calibrate(storage_format)
    ways = ROUNDINGS if storage_format.grid is not None else {}
    run = {_program(each) for each in opened}
    return FormatRow(
        name=storage_format.name,
        bits_per_weight=storage_format.bits_per_weight,
        roundings=tuple(name for name, way in ways.items() if calibrates or not way.calibrated),
        takes_calibration=calibrates,
        layout=storage_format.layout,
        opened=opened,
        documented=tuple(each for each in storage_format.loaders.split(", ") if _program(each) not in run),
    )


def _program(loader: str) -> str:
    return loader.partition(" ")[0].lower()
