"""The pass that measures inputs: decoder layers are run on text, for the scales by which loaders round activations.

It needs transformers, an extra: what does is imported inside functions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from streamconv.calibration.subject import Subject
from streamconv.checkpoint.layout import Placed
from streamconv.formats.base import InputMeasured
from streamconv.pipeline.passes.base import Found, PassKind
from streamconv.pipeline.passes.calibrate import over_text
from streamconv.planning.plan import Pass, Plan, Rewrite, ShardPlan, Step
from streamconv.progress import OnBytes, StopRequest

NAME = "measure"
FOLDER = "inputs"
# What the file of a layer says of a weight, beside its name.
_LINE_BYTES = 128
_log = logging.getLogger(__name__)


def _plan(subject: Subject) -> Pass | None:
    steps = subject.plan.measured
    if not steps:
        return None
    from streamconv.calibration.need import measuring_need

    need = measuring_need(subject)
    kept = sum(len(json.dumps(step.name)) + _LINE_BYTES for step in steps)
    return over_text(NAME, FOLDER, subject, replace(need, disk=need.disk + kept), kept)


def _run(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Found:
    from streamconv.calibration.measuring import measure

    _log.info("measuring the inputs of %d weights", len(subject.plan.measured))
    found = measure(subject, folder, on_bytes, stop)
    return Found(partial(_informed, greatest=found))


def _informed(plan: Plan, greatest: Mapping[str, float]) -> Plan:
    """`plan` with encoders that know; bytes, places and fingerprint are the same."""

    def known(placed: Placed[Step]) -> Placed[Step]:
        step = placed.step
        if not isinstance(step, Rewrite) or step.name not in greatest:
            return placed
        assert isinstance(step.encoder, InputMeasured)
        return replace(placed, step=replace(step, encoder=step.encoder.measuring(greatest[step.name])))

    shards: list[ShardPlan] = [replace(each, steps=tuple(map(known, each.steps))) for each in plan.shards]
    return replace(plan, shards=tuple(shards))


MEASURE = PassKind(None, _plan, _run)
