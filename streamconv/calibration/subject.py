"""The subject of a pass: a job's model and its plan, with weights still to be rounded."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.adapters.base import Adapter
from streamconv.equalization.pairs import Equalization
from streamconv.planning.base import Base
from streamconv.planning.plan import CalibrationPlan, Plan
from streamconv.rounding.feedback import FeedbackOptions
from streamconv.storage.file_set import FileSet


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that passes go over: `plan` is the output's, `tokenizer` has its files, None where no text is read.

    Weights whose step says `calibrated` are given codes, as far as they are linear layers of a decoder layer.
    """

    base: Base
    adapter: Adapter | None
    plan: Plan
    tokenizer: FileSet | None

    @property
    def calibration(self) -> CalibrationPlan:
        """Plan of the calibration: the text, and the use that is made of it."""
        assert self.plan.calibration is not None, "there is no text to calibrate by"
        return self.plan.calibration

    @property
    def feedback(self) -> FeedbackOptions:
        """Options by which the text chooses codes."""
        assert self.calibration.options is not None, "the text chooses no codes"
        return self.calibration.options

    @property
    def equalization(self) -> Equalization:
        """Pairs of weights that are equalized by it."""
        assert self.calibration.equalization is not None, "nothing is equalized"
        return self.calibration.equalization

    @property
    def sequences(self) -> int:
        return self.calibration.tokens // self.calibration.sequence_length

    @property
    def gradient_sequences(self) -> int:
        return self.calibration.gradient_tokens // self.calibration.sequence_length
