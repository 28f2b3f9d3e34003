"""`merge()` and `convert()`: one call from inputs to a published, verified output."""

from __future__ import annotations

from typing import Unpack

from streamconv.output.manifest import Report
from streamconv.pipeline.downloads import fetch
from streamconv.pipeline.job import build_job, output_folder
from streamconv.pipeline.preparation import prepare
from streamconv.pipeline.runner import run
from streamconv.planning.options import (
    CONVERT_DEFAULTS,
    MERGE_DEFAULTS,
    ConvertKeywords,
    Folder,
    Folders,
    Job,
    MergeKeywords,
    takes,
)
from streamconv.progress import OnProgress, StopRequest, quiet


@takes(MergeKeywords, MERGE_DEFAULTS)
def merge(
    base: Folder | None,
    adapter: Folders,
    out: Folder,
    *,
    on_progress: OnProgress = quiet,
    on_download: OnProgress = quiet,
    **options: Unpack[MergeKeywords],
) -> Report:
    """Merge a PEFT adapter into a base checkpoint and write the result to the folder `out`.

    `base` and `adapter` are folders, Hub ids (`org/model`, `org/model@revision`) or prefixes of an object store
    (`s3://bucket/prefix`, `gs://`, `az://`); of several adapters, a list.
    Without a base (None) it is the one that the first adapter names. `also` names formats of further outputs, written
    to folders of these names in `out` from the same reading; the report has theirs, by format.

    Keywords are the options of `streamconv merge`; sizes are bytes or text such as "5GB". Raises a
    StreamconvError, whose `exit_code` is what the command would have ended with. Calling it again with the same
    arguments after an interruption goes on where it stopped.
    """
    return _carry_out(build_job(base, adapter, **options), out, on_progress, on_download)


@takes(ConvertKeywords, CONVERT_DEFAULTS)
def convert(
    base: Folder,
    out: Folder,
    *,
    on_progress: OnProgress = quiet,
    on_download: OnProgress = quiet,
    **options: Unpack[ConvertKeywords],
) -> Report:
    """Quantize, dequantize or reshard a checkpoint without an adapter; otherwise as `merge`."""
    return _carry_out(build_job(base, **options), out, on_progress, on_download)


def _carry_out(job: Job, out: Folder, on_progress: OnProgress, on_download: OnProgress) -> Report:
    folder = output_folder(out)
    prepared = prepare(job)
    fetch(prepared, folder, on_download)
    return run(prepared, folder, on_progress, StopRequest())
