"""A plan of a merge, as Python is given it: what would be read, written and taken, before anything is."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.pipeline.preparation import Prepared
from streamconv.pipeline.shown import plan_as_json, plan_as_text
from streamconv.sizes import format_size


@dataclass(frozen=True, slots=True, repr=False)
class Planned:
    """Plan of a merge or conversion. Sizes in bytes: memory at most, disk at most, what is read and fetched before.

    `text` is the page that `streamconv plan` prints, `details` what its `--json` gives.
    """

    quant: str
    rounding: str | None
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_bytes: int
    read_bytes: int
    download_bytes: int
    text: str
    details: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data, as `streamconv plan --json` prints it."""
        return dict(self.details)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        rounding = f", {self.rounding} rounding" if self.rounding else ""
        return (
            f"<Planned {self.quant}{rounding}: reads {format_size(self.read_bytes)}, "
            f"disk {format_size(self.disk_bytes)}, memory {format_size(self.peak_ram_bytes)}>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


def planned(prepared: Prepared) -> Planned:
    """The plan of what is prepared."""
    details, chosen = plan_as_json(prepared), prepared.plan.rounding
    return Planned(
        quant=details["quant"],
        rounding=chosen.name if chosen else None,
        peak_ram_bytes=details["peak_ram_bytes"],
        peak_vram_bytes=details["peak_vram_bytes"],
        disk_bytes=details["disk_bytes"],
        read_bytes=details["read_bytes"],
        download_bytes=sum(file["bytes"] for file in details["downloads"]),
        text=plan_as_text(prepared),
        details=details,
    )
