"""Facts on every format, as `streamconv formats` and docs/formats.md show them: from a file, which is read at once.

`tools/fix` writes it, of the formats themselves and of what `tools/foreign` found.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = "formats.json"


@dataclass(frozen=True, slots=True)
class FormatRow:
    """A format's entry. `chosen_by` are its `roundings` in words as few as possible. `opened`: programs with their
    versions that opened files of it when `tools/foreign` ran them; `documented`: others that open it by their
    documentation.
    """

    name: str
    bits_per_weight: float
    roundings: tuple[str, ...]
    chosen_by: str
    takes_calibration: bool
    layout: str
    opened: tuple[str, ...]
    documented: tuple[str, ...]

    @property
    def uses(self) -> str:
        """Words for each thing that can be done with it. A base that has it can keep it, codes and scales included."""
        return "read, write, keep"

    @property
    def loaders(self) -> str:
        """Programs that open it, in words."""
        documented = f"documented: {', '.join(self.documented)}" if self.documented else ""
        return "; ".join(filter(None, (", ".join(self.opened), documented)))


def read_rows() -> tuple[FormatRow, ...]:
    """A row for each format, in the order in which they are listed."""
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_name(ROWS).read_text("utf-8"))
    lists = ("roundings", "opened", "documented")
    return tuple(FormatRow(**(row | {name: tuple(row[name]) for name in lists})) for row in found)
