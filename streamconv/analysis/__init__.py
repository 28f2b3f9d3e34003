"""Analysis of a merge: the size of each weight's update, and the share that each way to store the result keeps."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Unpack

from streamconv.analysis.options import (
    AnalysisOptions,
    check_formats,
    check_layers,
)
from streamconv.analysis.result import Analysis, OnGrid, Stored, TargetAnalysis, WeightAnalysis
from streamconv.analysis.running import run_analysis
from streamconv.errors import OptionError, OutputError
from streamconv.pipeline.job import build_job, output_folder
from streamconv.planning.options import (
    ANALYZE_DEFAULTS,
    AdapterKeywords,
    AnalyzeKeywords,
    BaseKeywords,
    Folder,
    only,
    takes,
)
from streamconv.progress import OnProgress, quiet
from streamconv.system_errors import translated

__all__ = ["Analysis", "OnGrid", "Stored", "TargetAnalysis", "WeightAnalysis", "analyze"]


@takes(AnalyzeKeywords, ANALYZE_DEFAULTS)
@translated()
def analyze(
    base: Folder | None,
    adapter: Folder,
    *,
    on_progress: OnProgress = quiet,
    **given: Unpack[AnalyzeKeywords],
) -> Analysis:
    """Measure, weight by weight, what merging `adapter` into `base` does; nothing but plots is written.

    Without a base (None) it is the one that the adapter names.

    Keywords are the options of `streamconv analyze`. `report` names a folder for plots, which need
    `streamconv[report]`: without it, raises OptionError; otherwise a StreamconvError, whose `exit_code` is what the
    command would have ended with.
    """
    job = build_job(
        base,
        adapter,
        quant="none",
        seed=given["seed"],
        card=False,
        tokenizer="base",
        **only(BaseKeywords, given),
        **only(AdapterKeywords, given),
    )
    options = AnalysisOptions(
        job, given["merge_base"].lower(), check_formats(given["formats"]), check_layers(given["layers"])
    )
    report = given["report"]
    folder = None if report is None else _report_folder(report)
    found = run_analysis(options, on_progress)
    if folder is None:
        return found
    from streamconv.analysis.plots import draw

    return replace(found, plots=draw(found, folder))


def _report_folder(report: Folder) -> Path:
    if find_spec("matplotlib") is None:
        raise OptionError(
            "--report draws with matplotlib, not installed here; run pip install 'streamconv[report]', or leave it out"
        )
    folder = output_folder(report)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(
            f"{folder}: cannot write the plots there: it is not a folder; choose another --report"
        )
    return folder
