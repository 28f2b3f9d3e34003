"""The residual adapter of an output in work: made of what the calibration pass left, before anything is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.calibration.residual_adapter import adapter_config, removed_share, write_adapter
from streamconv.calibration.subject import Calibrated
from streamconv.planning.plan import Plan

_WAITING = "residual-adapter.safetensors"


@dataclass(frozen=True, slots=True)
class ResidualAdapter:
    """Its tensors wait at `path`; `config` is the content of its adapter_config.json.

    `removed` is the share of the calibration's loss that it takes away, None where codes had none.
    """

    path: Path
    sha256: str
    size: int
    config: bytes
    rank: int
    weights: int
    removed: float | None

    def as_json(self) -> dict[str, Any]:
        """What manifest, card and report say of it."""
        return {"rank": self.rank, "weights": self.weights, "bytes": self.size, "removed": self.removed}

    @property
    def entry(self) -> Mapping[str, Any]:
        """Its tensors, as the manifest lists files."""
        return {"size": self.size, "sha256": self.sha256}


def make_residual(plan: Plan, calibrated: Mapping[str, Calibrated], folder: Path) -> ResidualAdapter | None:
    """The adapter that `plan` asks for, written to `folder`; None where it asks for none."""
    if not plan.residual_rank:
        return None
    path = folder / _WAITING
    sha256 = write_adapter(path, calibrated)
    return ResidualAdapter(
        path=path,
        sha256=sha256,
        size=path.stat().st_size,
        config=adapter_config(plan.residual_rank, calibrated),
        rank=plan.residual_rank,
        weights=len(calibrated),
        removed=removed_share(found.notes for found in calibrated.values()),
    )
