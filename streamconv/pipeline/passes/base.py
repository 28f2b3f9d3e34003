"""A kind of pass: how a plan comes to have it, what it does, and what its results are to the rest of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.calibration.subject import Subject
from streamconv.checkpoint.types import StoredTensor
from streamconv.planning.plan import Pass, Plan
from streamconv.progress import OnBytes, StopRequest
from streamconv.running.cell import KeptDelta


@dataclass(frozen=True, slots=True)
class Found:
    """Results of a pass, by weight. `apply` gives a plan whose steps use them, of the same bytes, places and digest.

    `notes` are what a report says of weights, `kept` the sums of those whose bytes the pass has made. `residual` are
    tensors, by name, of an adapter that goes beside the weights and repairs their errors.
    """

    apply: Callable[[Plan], Plan]
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kept: Mapping[str, KeptDelta] = field(default_factory=dict)
    residual: Mapping[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PassKind:
    """A kind of pass; `told` is the key under which manifests have its notes, None where it makes none.

    `plan` gives the pass that a plan is to have, under the kind's name; None where it has no use for one. `run` carries
    it out, or goes on with it, in a folder of its own: what that holds once it is complete is read, not made again.
    Progress is in bytes of the base, as many as the pass needs to read. `run` is given the plan with the results of
    passes before.
    """

    told: str | None
    plan: Callable[[Subject], Pass | None]
    run: Callable[[Subject, Path, OnBytes, StopRequest], Found]
