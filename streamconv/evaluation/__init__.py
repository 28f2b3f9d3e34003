"""Evaluation of a model on a text, layers streamed: perplexity, and KL and agreement with a reference."""

from __future__ import annotations

from importlib.util import find_spec
from os import fspath
from pathlib import Path
from typing import Unpack

from streamconv.errors import OptionError
from streamconv.evaluation.options import (
    EvaluationOptions,
    check_dtype,
    check_lengths,
    check_reference,
    subject_of,
)
from streamconv.evaluation.result import Comparison, Evaluation, Greedy
from streamconv.pipeline.job import build_job
from streamconv.planning.options import (
    EVALUATE_DEFAULTS,
    EvaluateKeywords,
    Folder,
    Job,
    ModelKeywords,
    only,
    takes,
)
from streamconv.progress import OnProgress, quiet
from streamconv.system_errors import translated

__all__ = ["Comparison", "Evaluation", "EvaluationOptions", "Greedy", "evaluate"]


@takes(EvaluateKeywords, EVALUATE_DEFAULTS)
@translated()
def evaluate(
    model: Folder | None = None,
    *,
    data: Folder,
    base: Folder | None = None,
    adapter: Folder | None = None,
    on_progress: OnProgress = quiet,
    **given: Unpack[EvaluateKeywords],
) -> Evaluation:
    """Perplexity of a checkpoint, or of a base with an adapter that is not merged, on the text in the file `data`.

    Keywords are the options of `streamconv eval`. Needs `streamconv[eval]`: without it, raises OptionError; otherwise
    a StreamconvError, whose `exit_code` is what the command would have ended with.
    """
    options = _options(subject_of(model, base, adapter), adapter, data, given)
    _check_installed()
    from streamconv.evaluation.scoring import run_evaluation

    return run_evaluation(options, on_progress)


def _options(
    place: Folder | None, adapter: Folder | None, data: Folder, given: EvaluateKeywords
) -> EvaluationOptions:
    reference, cache = given["reference"], given["reference_cache"]
    sequence_length, tokens, greedy_tokens = given["sequence_length"], given["tokens"], given["greedy_tokens"]
    check_reference(reference, given["reference_adapter"], greedy_tokens, cache)
    check_dtype(given["dtype"])
    check_lengths(sequence_length, tokens, greedy_tokens)
    subject = _job(place, adapter, given["merge_base"], given, given["base_revision"])
    other = None
    if reference is not None:
        other = _job(reference, given["reference_adapter"], given["reference_merge_base"], given, None)
    return EvaluationOptions(
        subject,
        other,
        Path(fspath(data)).expanduser(),
        sequence_length,
        tokens // sequence_length,
        greedy_tokens,
        None if cache is None else Path(fspath(cache)).expanduser(),
    )


def _job(
    place: Folder | None,
    adapter: Folder | None,
    merge_base: str,
    given: EvaluateKeywords,
    revision: str | None,
) -> Job:
    """The job whose output would be the dense weights that are evaluated."""
    shared = only(ModelKeywords, given)
    shared["base_revision"] = revision
    if adapter is None:
        shared["adapter_revision"] = shared["adapter_subfolder"] = None
    return build_job(place, adapter, quant="none", dtype=given["dtype"], merge_base=merge_base, **shared)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"an evaluation needs {' and '.join(missing)}, not installed here; run pip install 'streamconv[eval]'"
        )


# Libraries of the extra `eval`, which the evaluation itself imports.
_NEEDED = ("transformers", "accelerate")
