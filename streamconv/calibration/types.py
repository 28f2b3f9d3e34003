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
    """One weight's final bytes, `parts` by tensor name, with what survived of its update: nothing where it had none.

    `notes` are for reports: `tokens` whose inputs were seen; `relative_error`, √(tr(E H Eᵀ) / tr(T H Tᵀ)) with
    E = T - Q; and `kept_h`, <Q - B, D> / ||D||² in the metric of H, where there was an update.
    """

    parts: Mapping[str, StoredTensor]
    kept: KeptDelta
    notes: Mapping[str, float]
