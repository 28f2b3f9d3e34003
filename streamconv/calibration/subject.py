"""The subject of a pass: a job's model and its plan, with weights still to be rounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamconv.adapters.base import Adapter
from streamconv.equalization.pairs import Rescaling
from streamconv.planning.base import Base
from streamconv.planning.plan import CalibrationPlan, Plan
from streamconv.rounding.feedback import FeedbackOptions


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that passes go over: `plan` is the output's, `tokenizer` a folder, None where no text is to be read.

    Weights whose step says `calibrated` are given codes, as far as they are linear layers of a decoder layer.
    """

    base: Base
    adapter: Adapter | None
    plan: Plan
    tokenizer: Path | None

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
