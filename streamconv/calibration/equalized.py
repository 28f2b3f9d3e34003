"""Equalized weights, whose scales a text has chosen, and a plan that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamconv.checkpoint.layout import Placed
from streamconv.checkpoint.types import StoredTensor
from streamconv.planning.plan import Plan, Rewrite, ShardPlan, Step


@dataclass(frozen=True, slots=True)
class Equalized:
    """A weight whose scales have been chosen: its `factors` by role, float32 vectors.

    Of what is divided, `notes` have `alpha`, the `relative_error` of its consumers' outputs once they are rounded to
    the nearest, and the same without equalization, `unscaled_error`.
    """

    factors: Mapping[str, StoredTensor]
    notes: Mapping[str, float]


def equalized_plan(plan: Plan, found: Mapping[str, Equalized]) -> Plan:
    """`plan` with the factors of its scalings where they lie; bytes, places and fingerprint are the same."""
    return replace(plan, shards=tuple(_equalized_shard(shard, found) for shard in plan.shards))


def _equalized_shard(shard: ShardPlan, found: Mapping[str, Equalized]) -> ShardPlan:
    steps: list[Placed[Step]] = []
    for placed in shard.steps:
        step = placed.step
        if isinstance(step, Rewrite) and step.scaling is not None:
            factors = found[step.name].factors
            scaling = replace(step.scaling, parts={role: factors[role] for role in step.scaling.roles})
            placed = replace(placed, step=replace(step, scaling=scaling))  # noqa: PLW2901
        steps.append(placed)
    return replace(shard, steps=tuple(steps))
