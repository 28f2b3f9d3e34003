"""Result of an extraction: the rank of each weight's factors, and what they leave of its difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExtractedWeight:
    """Norms are Frobenius norms of the difference, and of what the stored factors leave of it."""

    rank: int
    norm: float
    residual_norm: float

    @property
    def residual(self) -> float:
        """Share of the norm that is left, 0 to 1."""
        return self.residual_norm / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class Extraction:
    """Result of `extract`. Sizes in bytes, times in seconds; `weights` have factors, `saved` are whole, by name.

    `residual` is the norm of all that the factors leave by that of all differences that have factors; None where none
    has. `unchanged` counts parameters that are the same in both.
    """

    out: str
    base: str
    finetuned: str
    residual: float | None
    weights: Mapping[str, ExtractedWeight]
    saved: tuple[str, ...]
    unchanged: int
    notes: tuple[str, ...]
    bytes_written: int
    seconds: float
    peak_ram_bytes: int

    def as_json(self) -> dict[str, Any]:
        weights = {name: asdict(each) | {"residual": each.residual} for name, each in self.weights.items()}
        return asdict(self) | {"weights": weights}


def total_residual(weights: Iterable[ExtractedWeight]) -> float | None:
    """Residual of all differences together."""
    pairs = [(each.norm**2, each.residual_norm**2) for each in weights]
    norm, left = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return math.sqrt(left / norm) if norm else None
