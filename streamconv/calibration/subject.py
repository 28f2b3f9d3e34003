"""What is calibrated, and the plan that follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.adapters.base import Adapter
from streamconv.calibration.types import Calibrated
from streamconv.layout import Placed
from streamconv.plan import Copy, Plan, Rewrite, Step
from streamconv.planner import Base


@dataclass(frozen=True, slots=True)
class Subject:
    """A plan with calibrated steps, its inputs, and the folder of the tokenizer."""

    base: Base
    adapter: Adapter | None
    plan: Plan
    tokenizer: Path


def calibrated_plan(plan: Plan, found: Mapping[str, Calibrated]) -> Plan:
    """`plan` with the bytes of `found` copied instead of made."""
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
