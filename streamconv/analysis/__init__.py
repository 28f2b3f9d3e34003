"""Analysis of a merge: the size of each weight's update, and the share that each way to store the result keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from streamconv.analysis.options import (
    DEFAULT_FORMATS,
    AnalysisOptions,
    check_formats,
    check_layers,
)
from streamconv.analysis.result import Analysis, OnGrid, Stored, TargetAnalysis, WeightAnalysis
from streamconv.analysis.running import run_analysis
from streamconv.errors import OptionError
from streamconv.pipeline.job import Folder, build_job, output_folder
from streamconv.progress import OnProgress, quiet

__all__ = ["Analysis", "OnGrid", "Stored", "TargetAnalysis", "WeightAnalysis", "analyze"]


def analyze(
    base: Folder,
    adapter: Folder,
    *,
    formats: Iterable[str] = DEFAULT_FORMATS,
    merge_base: str = "auto",
    layers: Iterable[int] | None = None,
    report: Folder | None = None,
    seed: int = 0,
    moe_layout: str = "auto",
    allow_pickle: bool = False,
    device: str = "auto",
    max_ram: str | int = "1GiB",
    max_vram: str | int = "2GiB",
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    on_progress: OnProgress = quiet,
) -> Analysis:
    """Measure, weight by weight, what merging `adapter` into `base` does; nothing but plots is written.

    Keywords are the options of `streamconv analyze`. `report` names a folder for plots, which need
    `streamconv[report]`: without it, raises OptionError; otherwise a StreamconvError, whose `exit_code` is what the
    command would have ended with.
    """
    job = build_job(
        base,
        adapter,
        quant="none",
        seed=seed,
        moe_layout=moe_layout,
        allow_pickle=allow_pickle,
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        card=False,
        tokenizer="base",
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
    )
    options = AnalysisOptions(job, merge_base.lower(), check_formats(formats), check_layers(layers))
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
    return output_folder(report)
