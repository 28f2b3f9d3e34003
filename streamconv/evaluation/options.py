"""Options of one evaluation. Names, meanings and defaults are those of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import OptionError
from streamconv.planning.options import Folder, Job
from streamconv.planning.spelling import type_name

LEAST_LENGTH = 16


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Options checked and parsed as far as they can be without inputs.

    `subject` and `reference` are jobs whose output would be the dense weights that are evaluated. `reference_cache` is
    the folder that keeps what the reference answers, None where nothing is kept. The text is read with the tokenizer
    of the subject, or with that of the reference where `tokenizer_of_reference` is set.
    """

    subject: Job
    reference: Job | None
    data: Path
    sequence_length: int
    sequences: int
    greedy_tokens: int
    reference_cache: Path | None = None
    tokenizer_of_reference: bool = False


def subject_of(model: Folder | None, base: Folder | None, adapter: Folder | None) -> Folder | None:
    """The checkpoint that is evaluated, with the adapter on it or without; None for the base that the adapter names."""
    if model is not None and base is not None:
        raise OptionError(
            "MODEL and --base are both given; name a finished model, or --base with --adapter for one not merged"
        )
    if model is not None and adapter is not None:
        raise OptionError("--adapter needs --base, the model it was trained on; give that instead of MODEL")
    place = model if model is not None else base
    if place is None and adapter is None:
        raise OptionError(
            "nothing to evaluate: name a MODEL, or give --adapter, with the --base it was trained on"
        )
    return place


def check_reference(
    reference: Folder | None, adapter: Folder | None, greedy_tokens: int, cache: Folder | None
) -> None:
    """Raise OptionError for what is said of a reference where there is none."""
    if reference is None and (adapter is not None or greedy_tokens or cache is not None):
        raise OptionError(
            "--reference-adapter, --reference-cache and --greedy-tokens are about a reference; add --reference MODEL"
        )


def check_dtype(dtype: object) -> None:
    """Raise OptionError for `auto`, which other commands know; that a name is known is checked with the plan."""
    if type_name(dtype) == "auto":
        raise OptionError("--dtype says in what the model is computed; use float32, bfloat16 or float16")


def check_lengths(sequence_length: int, tokens: int, greedy_tokens: int) -> None:
    if sequence_length < LEAST_LENGTH:
        raise OptionError(f"--sequence-length {sequence_length} is too short; give {LEAST_LENGTH} or more")
    if tokens < sequence_length:
        raise OptionError(
            f"--tokens {tokens} is less than one sequence of {sequence_length}; give more, or a smaller"
            " --sequence-length"
        )
    if not 0 <= greedy_tokens <= sequence_length // 2:
        raise OptionError(
            f"--greedy-tokens {greedy_tokens} must be between 0 and {sequence_length // 2}, half of --sequence-length: "
            "the other half is the prompt"
        )
