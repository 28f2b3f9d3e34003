"""Calibrated weights, whose codes a text has chosen, and a plan that copies them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from streamconv.checkpoint.layout import Placed, nbytes
from streamconv.checkpoint.types import StoredTensor
from streamconv.planning.plan import Copy, Plan, Rewrite, ShardPlan, SideParts, Step
from streamconv.running.cell import KeptDelta


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A weight whose codes have been chosen: `parts` hold the final bytes, by name of the output's tensor.

    `kept` is None where the weight had no update. `notes` are what a report says beside: `tokens` whose inputs were
    seen; `relative_error` of the output on them, √(tr(E H Eᵀ) / tr(T H Tᵀ)) with E = T - Q; and of an update `kept_h`,
    the share that is kept in the metric of H. With a residual adapter, `loss` is the error in the metric that codes are
    chosen by, and `repaired_loss` what it is with the adapter beside. `residual` are that adapter's tensors, by name.
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


def _calibrated_shard(shard: ShardPlan, found: Mapping[str, Calibrated]) -> ShardPlan:
    steps: list[Placed[Step]] = []
    for placed in shard.steps:
        if isinstance(placed.step, SideParts):
            steps += _calibrated_parts(placed.step, placed.offset, found)
            continue
        if not isinstance(placed.step, Rewrite) or not placed.step.calibrated:
            steps.append(placed)
            continue
        if placed.step.name not in found:
            steps.append(replace(placed, step=replace(placed.step, calibrated=False)))
            continue
        start, parts = placed.offset, found[placed.step.name].parts
        for spec in placed.step.specs:
            steps.append(Placed(Copy(spec.name, parts[spec.name], spec), start, spec.nbytes))
            start += spec.nbytes
    return replace(shard, steps=tuple(steps))


def _calibrated_parts(step: SideParts, start: int, found: Mapping[str, Calibrated]) -> Iterator[Placed[Step]]:
    """Parts that lie behind other weights: copies of those that are found, the others as they were planned."""
    shape = (1, *step.spec.shape[1:])
    for is_found, names in groupby(step.weights, key=found.__contains__):
        weights = tuple(names)
        if is_found:
            each: list[Step] = [
                Copy(step.name, found[name].parts[step.name], replace(step.spec, shape=shape))
                for name in weights
            ]
        else:
            each = [replace(step, weights=weights, spec=replace(step.spec, shape=(len(weights), *shape[1:])))]
        for one in each:
            yield Placed(one, start, nbytes(one))
            start += nbytes(one)
