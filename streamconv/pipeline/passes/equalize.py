"""The pass that chooses scales: weights are equalized in pairs by a text, before any code is chosen.

It needs transformers, an extra: what does is imported inside functions.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from streamconv.calibration.equalized import equalized_plan
from streamconv.calibration.subject import Subject
from streamconv.pipeline.passes.base import Found, PassKind
from streamconv.pipeline.passes.calibrate import over_text
from streamconv.planning.plan import Pass
from streamconv.progress import OnBytes, StopRequest

NAME = "equalize"
FOLDER = "rescaling"
_log = logging.getLogger(__name__)


def _plan(subject: Subject) -> Pass | None:
    if subject.plan.calibration is None or subject.plan.calibration.equalization is None:
        return None
    from streamconv.calibration.need import equalizing_need

    need, kept = equalizing_need(subject), subject.plan.equalizer_bytes
    # Room to spare for the factors, beside that which the pass itself counts.
    return over_text(NAME, FOLDER, subject, replace(need, disk=need.disk + kept), kept)


def _run(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Found:
    from streamconv.calibration.equalizing import equalize

    _log.info("choosing scales of %d weights", len(subject.plan.equalizers))
    found = equalize(subject, folder, on_bytes, stop)
    return Found(
        partial(equalized_plan, found=found),
        notes={name: each.notes for name, each in found.items()},
    )


EQUALIZE = PassKind("rescaled", _plan, _run)
