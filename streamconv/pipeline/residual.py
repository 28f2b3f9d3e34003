"""The residual adapter of an output in work: made of what passes left for it, before anything is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.calibration.residual_adapter import adapter_config, removed_share, write_adapter
from streamconv.pipeline.passes import Passed, calibrate

_WAITING = f"{calibrate.FOLDER}/residual-adapter.safetensors"


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
        """Facts that manifest, card and report give of it."""
        return {"rank": self.rank, "weights": self.weights, "bytes": self.size, "removed": self.removed}

    @property
    def entry(self) -> Mapping[str, Any]:
        """Its tensors, as the manifest lists files."""
        return {"size": self.size, "sha256": self.sha256}


def make_residual(passed: Passed, folder: Path) -> ResidualAdapter | None:
    """The adapter that the plan asks for, in the work folder `folder`; None where it asks for none."""
    rank = passed.plan.residual_rank
    if not rank:
        return None
    found = passed.found[calibrate.NAME]
    path = folder / _WAITING
    sha256 = write_adapter(path, found.residual.values())
    return ResidualAdapter(
        path=path,
        sha256=sha256,
        size=path.stat().st_size,
        config=adapter_config(rank, found.residual),
        rank=rank,
        weights=len(found.notes),
        removed=removed_share(found.notes.values()),
    )
