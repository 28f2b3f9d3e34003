"""The calibration of a plan: text, sequences and equalized pairs, checked against the weights they are for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.equalization.base import Heads
from streamconv.equalization.pairs import Equalization, find_equalization
from streamconv.errors import OptionError
from streamconv.formats.base import Weight
from streamconv.formats.linear import is_expert
from streamconv.planning.base import Base
from streamconv.planning.options import Calibration, MergeOptions
from streamconv.planning.plan import CalibrationPlan, Rewrite, Step, is_to_be_measured
from streamconv.planning.quantized import QuantizedSet
from streamconv.rounding.feedback import FeedbackOptions

MAX_SEQUENCE_LENGTH = 2048


# H of a layer has no use with fewer tokens than inputs: feedback then fits the text. Published trials found it to do
# worse than nearest rounding near one token an input.
TOKENS_AN_INPUT = 2


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """Facts that planning a calibration needs beside headers: the text, as in CalibrationPlan, the `weights` that can
    be calibrated, how many positions the model has (None: any number), its text part's model type and heads (None: not
    told), and the version of the library that computes it.
    """

    data: str
    name: str
    sha256: str
    is_data_set: bool
    weights: frozenset[str]
    positions: int | None
    transformers: str
    model_type: str = ""
    heads: Heads | None = None


def plan_equalization(
    base: Base,
    weights: Mapping[str, Weight],
    chosen: QuantizedSet,
    options: MergeOptions,
    facts: CalibrationFacts | None,
) -> Equalization | None:
    """Pairs of weights that are equalized; None where that is not asked for. Raises UnsupportedError."""
    asked = options.calibration
    if asked is None or asked.rescale == "none":
        return None
    assert facts is not None
    return find_equalization(
        asked.rescale,
        base.index.storage.location,
        facts.model_type,
        facts.heads,
        {name: weight.shape for name, weight in weights.items()},
        facts.weights,
        chosen.weights,
    )


def plan_calibration(
    by_weight: Sequence[Sequence[Step]],
    options: MergeOptions,
    feedback: FeedbackOptions | None,
    equalization: Equalization | None,
    facts: CalibrationFacts,
) -> CalibrationPlan:
    """Raises OptionError for a text or sequences of a length that would not do, and where nothing is calibrated."""
    asked = options.calibration
    assert asked is not None
    length = _sequence_length(asked, facts)
    tokens = asked.tokens // length * length
    steps = [step for each in by_weight for step in each if isinstance(step, Rewrite) and step.calibrated]
    if feedback is not None:
        _check_calibrated(steps, asked, tokens, length)
    threads = asked.threads or len(os.sched_getaffinity(0))
    has_gradients = feedback is not None and not feedback.searches
    check_measured(by_weight, facts)
    return CalibrationPlan(
        data=facts.data,
        name=facts.name,
        sha256=facts.sha256,
        is_data_set=facts.is_data_set,
        tokens=tokens,
        sequence_length=length,
        options=feedback,
        threads=threads,
        transformers=facts.transformers,
        gradient_tokens=min(tokens, -(-asked.gradient_tokens // length) * length) if has_gradients else 0,
        equalization=equalization,
    )


def check_measured(by_weight: Sequence[Sequence[Step]], facts: CalibrationFacts | None) -> None:
    """Raise OptionError where a scale of inputs would have to be measured, and cannot be."""
    steps = [
        step for each in by_weight for step in each if isinstance(step, Rewrite) and is_to_be_measured(step)
    ]
    if not steps:
        return
    if facts is None:
        quant = steps[0].encoder.format
        raise OptionError(
            f"--quant {quant} has loaders round activations by a scale for each module, which must be measured on a "
            f"text: give one with --calibration FILE, a .txt or .jsonl such as the model will work on. {quant}a16 "
            "stores the same weights, leaves activations in 16 bit, and needs none"
        )
    for step in steps:
        if step.name not in facts.weights:
            raise OptionError(
                f"{step.name} cannot be stored as {step.encoder.format}: no linear layer in a decoder layer has it, "
                "where the scale of its inputs would be measured; leave it in 16 bit with --ignore"
            )


def _check_calibrated(steps: Sequence[Rewrite], asked: Calibration, tokens: int, length: int) -> None:
    """Raise OptionError where so many `tokens` are too few for `steps`, or there is nothing to be calibrated."""
    if not steps:
        raise OptionError(
            "calibration text would change nothing: every weight in the decoder layers keeps its codes; leave "
            "--calibration out"
        )
    widest = max(steps, key=lambda step: step.columns)
    least = -(-TOKENS_AN_INPUT * widest.columns // length) * length
    if tokens < least:
        raise OptionError(
            f"--calibration-tokens {asked.tokens} is too few: {widest.name} has {widest.columns} inputs, and with less "
            f"than {TOKENS_AN_INPUT} tokens for each, feedback does worse than nearest rounding; give {least} or more"
        )
    _check_rank(steps, asked.residual_rank)


def _check_rank(steps: Sequence[Rewrite], rank: int) -> None:
    """Raise OptionError for a residual adapter with more to it than the weights it repairs."""
    narrowest = min(steps, key=lambda step: min(step.rows, step.columns))
    most = min(narrowest.rows, narrowest.columns)
    expert = next((step.name for step in steps if is_expert(step.name)), None)
    if rank and expert is not None:
        raise OptionError(
            f"--residual-rank {rank} cannot repair {expert}: transformers has all experts of a layer in one parameter, "
            "and no module for which an adapter could be; leave it out"
        )
    if rank >= most:
        raise OptionError(
            f"--residual-rank {rank} is too high: {narrowest.name} is {narrowest.rows} x {narrowest.columns}, and "
            f"a rank of {most} repairs all of it; give less, such as 16"
        )


def _sequence_length(asked: Calibration, facts: CalibrationFacts) -> int:
    positions = facts.positions or MAX_SEQUENCE_LENGTH
    if asked.sequence_length is None:
        return min(MAX_SEQUENCE_LENGTH, positions)
    if facts.positions is not None and asked.sequence_length > facts.positions:
        raise OptionError(
            f"--calibration-sequence-length {asked.sequence_length} is more than the {facts.positions} positions of "
            "the model; give that or less"
        )
    return asked.sequence_length
