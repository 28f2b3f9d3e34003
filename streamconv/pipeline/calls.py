"""`merge()` and `convert()`: one call from inputs to a published, verified output; and `plan()` of one."""

from __future__ import annotations

from typing import Unpack

from streamconv.bars import bar
from streamconv.output.manifest import Report
from streamconv.pipeline.contents import check_contents
from streamconv.pipeline.downloads import fetch
from streamconv.pipeline.job import build_job, output_folder
from streamconv.pipeline.place import check_out
from streamconv.pipeline.planned import Planned, planned
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
    progress: bool = False,
    on_progress: OnProgress = quiet,
    on_download: OnProgress = quiet,
    **options: Unpack[MergeKeywords],
) -> Report:
    """Merge a PEFT adapter into a base checkpoint and write the result to the folder `out`.

    `base` and `adapter` are folders, Hub ids (`org/model`, `org/model@revision`) or prefixes of an object store
    (`s3://bucket/prefix`, `gs://`, `az://`); of several adapters, a list.
    Without a base (None) it is the one that the first adapter names. `also` names formats of further outputs, written
    to folders of these names in `out` from the same reading; the report has theirs, by format.

    Keywords are the options of `streamconv merge`, each described in docs/python.md; sizes are bytes or text such as
    "5GB". With `progress` bars are drawn, by tqdm; `on_progress` and `on_download` are called with the bytes that are
    done and those in all. Raises a StreamconvError, whose `exit_code` is what the command would have ended with.
    Calling it again with the same arguments after an interruption goes on where it stopped.
    """
    job = build_job(base, adapter, **options)
    return _carry_out("merge", job, out, progress, on_progress, on_download)


@takes(ConvertKeywords, CONVERT_DEFAULTS)
def convert(
    base: Folder,
    out: Folder,
    *,
    progress: bool = False,
    on_progress: OnProgress = quiet,
    on_download: OnProgress = quiet,
    **options: Unpack[ConvertKeywords],
) -> Report:
    """Quantize, dequantize or reshard a checkpoint without an adapter; otherwise as `merge`."""
    return _carry_out("convert", build_job(base, **options), out, progress, on_progress, on_download)


@takes(MergeKeywords, MERGE_DEFAULTS)
def plan(
    base: Folder | None,
    adapter: Folders | None = None,
    *,
    out: Folder | None = None,
    **options: Unpack[MergeKeywords],
) -> Planned:
    """Plan what `merge` would do, or `convert` without an adapter, from headers and configs alone.

    `out` is the folder that the result would go to: checked, not touched. Keywords and errors are those of `merge`.
    """
    prepared = prepare(build_job(base, adapter, **options))
    if out is not None:
        check_out(prepared, output_folder(out))
    check_contents(prepared)
    return planned(prepared)


def _carry_out(
    title: str, job: Job, out: Folder, progress: bool, on_progress: OnProgress, on_download: OnProgress
) -> Report:
    folder = output_folder(out)
    prepared = prepare(job)
    with bar("download", progress and bool(prepared.downloads()), on_download) as told:
        fetch(prepared, folder, told)
    with bar(title, progress, on_progress) as told:
        return run(prepared, folder, told, StopRequest())
