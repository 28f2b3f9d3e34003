"""The pass that chooses codes: decoder layers are run on text, and what enters a weight decides how it is rounded.

It needs transformers, an extra: what does is imported inside functions.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from streamconv.calibration.calibrated import calibrated_plan
from streamconv.calibration.subject import Subject
from streamconv.pipeline.passes.base import Found, PassKind
from streamconv.planning.plan import Need, Pass
from streamconv.progress import OnBytes, StopRequest

NAME = "calibrate"
FOLDER = "calibration"
_log = logging.getLogger(__name__)


def over_text(name: str, folder: str, subject: Subject, need: Need, kept_bytes: int) -> Pass:
    """A pass that runs decoder layers on the subject's calibration text."""
    return Pass(
        name,
        folder,
        need,
        kept_bytes,
        holds="to calibrate this model: its largest decoder layer, the statistics of its widest inputs and one "
        f"sequence of {subject.calibration.sequence_length} tokens",
        remedy="give a shorter --calibration-sequence-length",
    )


def _plan(subject: Subject) -> Pass | None:
    if subject.plan.calibration is None or subject.plan.calibration.options is None:
        return None
    from streamconv.calibration.need import calibrating_need

    return over_text(NAME, FOLDER, subject, calibrating_need(subject), subject.plan.calibrated_bytes)


def _run(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Found:
    from streamconv.calibration.layers import calibrate

    _log.info("calibrating %d weights", len(subject.plan.calibrated))
    found = calibrate(subject, folder, on_bytes, stop)
    return Found(
        partial(calibrated_plan, found=found),
        notes={name: each.notes for name, each in found.items()},
        kept={name: each.kept for name, each in found.items() if each.kept is not None},
        residual={name: stored for each in found.values() for name, stored in each.residual.items()},
    )


CALIBRATE = PassKind("calibrated", _plan, _run)
