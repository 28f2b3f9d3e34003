"""What is calibrated, and the plan that it makes of one with weights still to be rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.adapters.base import Adapter
from streamconv.calibration.types import Calibrated
from streamconv.layout import Placed
from streamconv.plan import CalibrationPlan, Copy, Plan, Rewrite, Step
from streamconv.planner import Base


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to calibrate as `plan` says, which is the output's; `tokenizer` is a folder.

    Weights whose step says `calibrated` are given codes: linear layers of decoder layers.
    """

    base: Base
    adapter: Adapter | None
    plan: Plan
    tokenizer: Path

    @property
    def calibration(self) -> CalibrationPlan:
        found = self.plan.calibration
        assert found is not None, "the plan calibrates nothing"
        return found

    @property
    def sequences(self) -> int:
        return self.calibration.tokens // self.calibration.sequence_length


def calibrated_plan(plan: Plan, found: Mapping[str, Calibrated]) -> Plan:
    """`plan` with the weights in `found` copied from where they lie; bytes, places and fingerprint are the same.

    What could not be calibrated is rounded as its step says.
    """
    return replace(plan, shards=tuple(_calibrated_shard(shard, found) for shard in plan.shards))


def _calibrated_shard(shard: ShardPlan, found: Mapping[str, Calibrated]) -> ShardPlan:
    steps: list[Placed[Step]] = []
    for placed in shard.steps:
        if not isinstance(placed.step, Rewrite) or not placed.step.calibrated:
            steps.append(placed)
            continue
        if placed.step.name not in found:
            steps.append(replace(placed, step=replace(placed.step, calibrated=False)))
            continue
        start, parts = placed.offset, found[placed.step.name].parts
        for spec in placed.step.specs:
            steps.append(Placed(Copy(spec.name, parts[spec.name]), start, spec.nbytes))
            start += spec.nbytes
    return replace(shard, steps=tuple(steps))
