"""What the calibration pass leaves of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.cells import KeptDelta
from streamconv.checkpoint.types import StoredTensor
from streamconv.plan import Need

__all__ = ["Calibrated", "Need"]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """One weight's final bytes, `parts` by tensor name, with what survived of its update; `notes` are for reports."""

    parts: Mapping[str, StoredTensor]
    kept: KeptDelta
    notes: Mapping[str, float]
