"""Evaluation of a model on a text, layers streamed: perplexity, and KL and agreement with a reference."""

from __future__ import annotations

from importlib.util import find_spec
from os import fspath
from pathlib import Path

from streamconv.errors import OptionError
from streamconv.evaluation.options import (
    MAX_RAM,
    EvaluationOptions,
    check_dtype,
    check_lengths,
    check_reference,
    subject_of,
)
from streamconv.evaluation.result import Comparison, Evaluation, Greedy
from streamconv.pipeline.job import Folder, Job, build_job
from streamconv.progress import OnProgress, quiet

__all__ = ["Comparison", "Evaluation", "EvaluationOptions", "Greedy", "evaluate"]


def evaluate(
    model: Folder | None = None,
    *,
    data: Folder,
    base: Folder | None = None,
    adapter: Folder | None = None,
    merge_base: str = "original",
    reference: Folder | None = None,
    reference_adapter: Folder | None = None,
    reference_merge_base: str = "original",
    reference_cache: Folder | None = None,
    sequence_length: int = 512,
    tokens: int = 16384,
    greedy_tokens: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    max_ram: str | int = MAX_RAM,
    max_vram: str | int = "2GiB",
    moe_layout: str = "auto",
    tokenizer: str = "auto",
    allow_pickle: bool = False,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    on_progress: OnProgress = quiet,
) -> Evaluation:
    """Perplexity of a checkpoint, or of a base with an adapter that is not merged, on the text in the file `data`.

    Keywords are the options of `streamconv eval`. Needs `streamconv[eval]`: without it, raises OptionError; otherwise
    a StreamconvError, whose `exit_code` is what the command would have ended with.
    """
    place = subject_of(model, base, adapter)
    check_reference(reference, reference_adapter, greedy_tokens, reference_cache)
    check_dtype(dtype)
    check_lengths(sequence_length, tokens, greedy_tokens)

    def job(place: Folder, adapter: Folder | None, merge_base: str, revision: str | None) -> Job:
        return build_job(
            place,
            adapter,
            quant="none",
            dtype=dtype,
            merge_base=merge_base,
            moe_layout=moe_layout,
            allow_pickle=allow_pickle,
            device=device,
            max_ram=max_ram,
            max_vram=max_vram,
            tokenizer=tokenizer,
            base_revision=revision,
            adapter_revision=adapter_revision if adapter is not None else None,
            adapter_subfolder=adapter_subfolder if adapter is not None else None,
        )

    other = None if reference is None else job(reference, reference_adapter, reference_merge_base, None)
    subject = job(place, adapter, merge_base, base_revision)
    text = Path(fspath(data)).expanduser()
    cache = None if reference_cache is None else Path(fspath(reference_cache)).expanduser()
    options = EvaluationOptions(
        subject, other, text, sequence_length, tokens // sequence_length, greedy_tokens, cache
    )
    _check_installed()
    from streamconv.evaluation.scoring import run_evaluation

    return run_evaluation(options, on_progress)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"an evaluation needs {' and '.join(missing)}, not installed here; run pip install 'streamconv[eval]'"
        )


# Libraries of the extra `eval`, which the evaluation itself imports.
_NEEDED = ("transformers", "accelerate")
