"""Results of one kind on the pretend GPU beside the CPU, and what the device was asked for meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.pretend.ledger import LEDGER


@dataclass
class Found:
    """A kind, on both devices, and what the GPU was asked for."""

    name: str
    same: bool
    kept: tuple[float | None, float | None] = (None, None)
    launches: int = 0
    moved: int = 0
    cells: int = 0
    waits_submitted: Mapping[str, int] = field(default_factory=dict)
    waits: int = 0
    crossed: int = 0
    reciprocals: Mapping[str, int] = field(default_factory=dict)
    planned: int = 0
    peak: int = 0
    dtypes: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    error: str = ""


def noted(found: Found) -> Found:
    """`found` with what the ledger has."""
    found.launches, found.moved, found.waits = LEDGER.launches, LEDGER.moved, sum(LEDGER.waits.values())
    found.waits_submitted = {
        f"{why}, {where}": count for (why, where), count in LEDGER.waits_submitted.items()
    }
    found.crossed = sum(LEDGER.crossed.values())
    found.reciprocals = dict(LEDGER.reciprocals)
    found.peak = LEDGER.peak
    found.dtypes = sorted(LEDGER.dtypes)
    return found


def start() -> None:
    gc.collect()
    LEDGER.reset()
