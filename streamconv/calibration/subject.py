"""What is calibrated, what comes of it, and the plan that it makes of one with weights still to be rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.adapters.base import Adapter
from streamconv.cells import KeptDelta
from streamconv.checkpoint.types import StoredTensor
from streamconv.formats.base import Constant
from streamconv.layout import Placed
from streamconv.plan import Calibration, Copy, Plan, Rewrite, ShardPlan, Step
from streamconv.planner import Base
from streamconv.rounding.feedback import FeedbackOptions


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to calibrate: `plan` is the output's, with its weights still to be rounded, `tokenizer` a folder.

    Weights whose step says `calibrated` are given codes, as far as they are linear layers of a decoder layer.
    """

    base: Base
    adapter: Adapter | None
    plan: Plan
    tokenizer: Path
    feedback: FeedbackOptions

    @property
    def text(self) -> Calibration:
        text = self.plan.options.calibration
        assert text is not None, "there is no text to calibrate by"
        return text

    @property
    def steps(self) -> Mapping[str, Rewrite]:
        """Steps of the weights that are to be calibrated, by name."""
        steps = (placed.step for shard in self.plan.shards for placed in shard.steps)
        return {step.name: step for step in steps if isinstance(step, Rewrite) and step.calibrated}


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A weight whose codes have been chosen: `parts` hold the final bytes, by name of the output's tensor.

    `kept` is None where the weight had no update. `tokens` are those whose inputs were seen; `error` is that of the
    weight's output on them, relative to the output: √(tr(E H Eᵀ) / tr(T H Tᵀ)), E = T - Q.
    """

    parts: Mapping[str, StoredTensor]
    kept: KeptDelta | None
    tokens: int
    error: float


def calibrated_plan(plan: Plan, found: Mapping[str, Calibrated]) -> Plan:
    """`plan` with the weights in `found` copied from where they lie; bytes, places and fingerprint are the same."""
    return replace(plan, shards=tuple(_calibrated_shard(shard, found) for shard in plan.shards))


def _calibrated_shard(shard: ShardPlan, found: Mapping[str, Calibrated]) -> ShardPlan:
    steps: list[Placed[Step]] = []
    for placed in shard.steps:
        if isinstance(placed.step, Constant) or placed.step.name not in found:
            steps.append(placed)
            continue
        start, parts = placed.offset, found[placed.step.name].parts
        for spec in placed.step.specs:
            steps.append(Placed(Copy(spec.name, parts[spec.name]), start, spec.nbytes))
            start += spec.nbytes
    return replace(shard, steps=tuple(steps))
