"""Passes over the base before a plan's own, and the one loop that carries them out, in a run and to verify it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from streamconv.calibration.subject import Subject
from streamconv.errors import ResourceError
from streamconv.output.journal import make_pass_folder
from streamconv.output.manifest import Notes
from streamconv.pipeline.passes import calibrate, enlarge, equalize, measure, survey
from streamconv.pipeline.passes.base import Found, PassKind
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Pass, Plan
from streamconv.progress import OnBytes, OnTurn, StopRequest, Turn, unnoticed
from streamconv.running.device_use import give_back
from streamconv.sizes import format_size

__all__ = ["PASSES", "Found", "PassKind", "Passed", "plan_passes", "run_passes"]

PASSES: Mapping[str, PassKind] = MappingProxyType(
    {
        equalize.NAME: equalize.EQUALIZE,
        survey.NAME: survey.SURVEY,
        enlarge.NAME: enlarge.ENLARGE,
        measure.NAME: measure.MEASURE,
        calibrate.NAME: calibrate.CALIBRATE,
    }
)
"""All kinds of passes, in the order in which they are carried out."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A plan with the results of all its passes in its steps, and these, by name of the pass."""

    plan: Plan
    found: Mapping[str, Found] = field(default_factory=dict)

    @property
    def notes(self) -> Notes:
        """Notes on weights, by what each kind of pass calls its own; none of those that were not carried out."""
        return {
            kind.told: _told(self.found[name].notes if name in self.found else {})
            for name, kind in PASSES.items()
            if kind.told is not None
        }


def _told(notes: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    return {weight: dict(each) for weight, each in sorted(notes.items()) if each}


def plan_passes(subject: Subject) -> tuple[Pass, ...]:
    """The passes of the subject's plan, in order. Raises ResourceError where a budget cannot hold what one needs."""
    planned = [kind.plan(subject) for kind in PASSES.values()]
    passes = tuple(each for each in planned if each is not None)
    _check_budgets(passes, subject.plan.options)
    return passes


def _check_budgets(passes: Sequence[Pass], options: MergeOptions) -> None:
    budgets: Sequence[tuple[str, int, Callable[[Pass], int]]] = (
        ("--max-ram", options.max_ram_bytes, lambda each: each.need.ram),
        ("--max-vram", options.max_vram_bytes, lambda each: each.need.vram),
    )
    for option, budget, needed in budgets:
        largest = max(passes, key=needed, default=None)
        if largest is not None and needed(largest) > budget:
            raise ResourceError(
                f"{option} {format_size(budget)} is too small {largest.holds} need "
                f"{math.ceil(needed(largest) / 2**20)}MiB; allow that much, or {largest.remedy}"
            )


def run_passes(
    subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest, on_turn: OnTurn = unnoticed
) -> Passed:
    """Carry out all passes of the subject's plan in turn, each in its own folder in `folder`, and told to `on_turn`.

    Goes on where an earlier call stopped. Raises Stopped if `stop` was set, and what the kinds of passes do.
    """
    found: dict[str, Found] = {}
    for each in subject.plan.passes:
        on_turn(Turn(each.name))
        place = make_pass_folder(folder, each.folder)
        try:
            made = found[each.name] = PASSES[each.name].run(subject, place, on_bytes, stop)
        finally:
            give_back(subject.plan.device)  # the next pass needs it in other sizes
        subject = replace(subject, plan=made.apply(subject.plan))
    return Passed(subject.plan, found)
