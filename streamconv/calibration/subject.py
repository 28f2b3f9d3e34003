"""What is calibrated, and the plan that it makes of one with weights still to be rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """`plan` with the bytes of `found` copied instead of made; places and fingerprint are the same."""
    shards = tuple(
        replace(shard, steps=tuple(each for placed in shard.steps for each in _placed(placed, found)))
        for shard in plan.shards
    )
    return replace(plan, shards=shards)


def _placed(placed: Placed[Step], found: Mapping[str, Calibrated]) -> Iterator[Placed[Step]]:
    step, offset = placed.step, placed.offset
    if not isinstance(step, Rewrite) or not step.calibrated:
        yield placed
        return
    for spec in step.specs:
        yield Placed(Copy(spec.name, found[step.name].parts[spec.name]), offset, spec.nbytes)
        offset += spec.nbytes
