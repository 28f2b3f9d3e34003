"""What is calibrated, what comes of it, and the plans that are made of one with weights still to be rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamconv.adapters.base import Adapter
from streamconv.checkpoint.layout import Placed
from streamconv.checkpoint.types import StoredTensor
from streamconv.equalization.pairs import Rescaling
from streamconv.planning.base import Base
from streamconv.planning.plan import CalibrationPlan, Copy, Plan, Rewrite, ShardPlan, Step
from streamconv.rounding.feedback import FeedbackOptions
from streamconv.running.cells import KeptDelta


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to calibrate: `plan` is the output's, with its weights still to be rounded, `tokenizer` a folder.

    Weights whose step says `calibrated` are given codes, as far as they are linear layers of a decoder layer.
    """

    base: Base
    adapter: Adapter | None
    plan: Plan
    tokenizer: Path

    @property
    def calibration(self) -> CalibrationPlan:
        """By which text, and how."""
        assert self.plan.calibration is not None, "there is no text to calibrate by"
        return self.plan.calibration

    @property
    def feedback(self) -> FeedbackOptions:
        """How codes are chosen by it."""
        assert self.calibration.options is not None, "the text chooses no codes"
        return self.calibration.options

    @property
    def rescaling(self) -> Rescaling:
        """Which weights are rescaled together by it."""
        assert self.calibration.rescaling is not None, "nothing is rescaled"
        return self.calibration.rescaling

    @property
    def sequences(self) -> int:
        return self.calibration.tokens // self.calibration.sequence_length

    @property
    def gradient_sequences(self) -> int:
        return self.calibration.gradient_tokens // self.calibration.sequence_length


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A weight whose codes have been chosen: `parts` hold the final bytes, by name of the output's tensor.

    `kept` is None where the weight had no update. `notes` are what a report says beside: `tokens` whose inputs were
    seen; `relative_error` of the output on them, √(tr(E H Eᵀ) / tr(T H Tᵀ)) with E = T - Q; and of an update `kept_h`,
    the share that is kept in the metric of H. With a residual adapter, `loss` is the error in the metric that codes are
    chosen by, and `repaired_loss` what it is with the adapter beside. `residual` are that adapter's tensors, by name.

    Or a weight whose scales have been: `parts` are its factors, called as `factor_name` says. Of what is divided,
    `notes` have `alpha`, the `relative_error` of its consumers' outputs once they are rounded to the nearest, and the
    same without rescaling, `unscaled_error`.
    """

    parts: Mapping[str, StoredTensor]
    kept: KeptDelta | None
    notes: Mapping[str, float]
    residual: Mapping[str, StoredTensor] = field(default_factory=dict)


def calibrated_plan(plan: Plan, found: Mapping[str, Calibrated]) -> Plan:
    """`plan` with the weights in `found` copied from where they lie; bytes, places and fingerprint are the same.

    What could not be calibrated is rounded as its step says.
    """
    return replace(plan, shards=tuple(_calibrated_shard(shard, found) for shard in plan.shards))


def factor_name(weight: str, role: str) -> str:
    """What a factor of a weight's scaling is called where it is kept."""
    return f"{weight}:{role}"


def rescaled_plan(plan: Plan, found: Mapping[str, Calibrated]) -> Plan:
    """`plan` with the factors of its scalings where they lie; bytes, places and fingerprint are the same."""
    return replace(plan, shards=tuple(_rescaled_shard(shard, found) for shard in plan.shards))


def _rescaled_shard(shard: ShardPlan, found: Mapping[str, Calibrated]) -> ShardPlan:
    steps: list[Placed[Step]] = []
    for placed in shard.steps:
        step = placed.step
        if isinstance(step, Rewrite) and step.scaling is not None:
            parts = found[step.name].parts
            factors = {role: parts[factor_name(step.name, role)] for role in step.scaling.roles}
            scaling = replace(step.scaling, parts=factors)
            placed = replace(placed, step=replace(step, scaling=scaling))  # noqa: PLW2901
        steps.append(placed)
    return replace(shard, steps=tuple(steps))


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
