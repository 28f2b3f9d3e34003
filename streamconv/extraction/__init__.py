"""Extraction of a low-rank adapter from two checkpoints: a base, and what fine-tuning made of it."""

from __future__ import annotations

from os import fspath
from typing import Unpack

from streamconv.extraction.checkpoints import open_checkpoints
from streamconv.extraction.options import read_options
from streamconv.extraction.result import ExtractedWeight, Extraction
from streamconv.extraction.running import run_extraction
from streamconv.pipeline.job import output_folder
from streamconv.planning.options import EXTRACT_DEFAULTS, ExtractKeywords, Folder, takes
from streamconv.progress import OnProgress, StopRequest, quiet
from streamconv.system_errors import translated

__all__ = ["ExtractedWeight", "Extraction", "extract"]


@takes(ExtractKeywords, EXTRACT_DEFAULTS)
def extract(
    base: Folder,
    finetuned: Folder,
    out: Folder,
    *,
    on_progress: OnProgress = quiet,
    stop: StopRequest | None = None,
    **given: Unpack[ExtractKeywords],
) -> Extraction:
    """Write a LoRA adapter to the folder `out` that makes `base` into `finetuned`, as near as its rank allows.

    Keywords are the options of `streamconv extract`. Raises a StreamconvError, whose `exit_code` is what the command
    would have ended with.
    """
    options = read_options(given)
    folder = output_folder(out)
    with translated(folder):
        subject = open_checkpoints(
            fspath(base), fspath(finetuned), given["base_revision"], given["finetuned_revision"], options
        )
        return run_extraction(subject, options, folder, on_progress, stop or StopRequest())
