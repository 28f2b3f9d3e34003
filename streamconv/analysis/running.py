"""Carries an analysis out: plan every view, measure weight by weight, add up."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from streamconv.analysis.advice import advise
from streamconv.analysis.measuring import Measured, bytes_to_read, measure
from streamconv.analysis.options import USUAL_MERGE_BASE, AnalysisOptions
from streamconv.analysis.result import Analysis, WeightAnalysis, by_kind, targets_of
from streamconv.analysis.views import AnalysisPlan, AnalyzedWeight, plan_views, without_budget
from streamconv.checkpoint.reader import TensorReader
from streamconv.pipeline.preparation import Prepared, prepare
from streamconv.planning.devices import AUTO, no_room, short_of_memory
from streamconv.progress import Meter, OnProgress
from streamconv.running.device_use import in_use


def run_analysis(options: AnalysisOptions, on_progress: OnProgress) -> Analysis:
    """See `analyze`."""
    started = time.monotonic()
    prepared = prepare(replace(options.job, options=without_budget(options.job.options)))
    scheme = plan_views(prepared, options)
    short = short_of_memory(scheme.device, scheme.memory.vram)
    if short and options.job.device != AUTO:
        raise no_room(options.job.device, short)
    if short:
        prepared = prepare(replace(prepared.job, device="cpu"))
        scheme = plan_views(prepared, options)
    for storage, files in prepared.downloads():
        storage.fetch(files, lambda _: None)
    total = sum(map(bytes_to_read, scheme.subjects))
    meter = Meter(total, on_progress, not scheme.device.is_cpu)
    meter.start(0)
    measured = _measure(scheme, options, meter)
    kinds = [(subject.kind, each) for subject, each in zip(scheme.subjects, measured, strict=True)]
    found = targets_of(measured)
    auto: dict[str, dict[str, str]] = {}
    for (target, name), choice in scheme.auto.items():
        auto.setdefault(target, {})[name] = choice.name
    return Analysis(
        base=options.job.base,
        adapter=str(options.job.adapter),
        targets={name: choice.reason for name, choice in scheme.targets.items()},
        auto=auto,
        advice=advise(found, scheme.auto, _merge_base(prepared, options)),
        total=found,
        kinds=by_kind(kinds),
        weights=tuple(map(_weight, scheme.subjects, measured)),
        plots=(),
        seconds=time.monotonic() - started,
        bytes_read=total,
        peak_ram_bytes=meter.peak,
        planned_ram_bytes=scheme.memory.ram,
    )


def _measure(scheme: AnalysisPlan, options: AnalysisOptions, meter: Meter) -> list[Measured]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # cells are shared between workers; see `run_plans`
    try:
        with in_use(scheme.device), TensorReader() as reader:
            found = [
                measure(subject, reader, scheme.device, options.job.options.seed, meter.add)
                for subject in scheme.subjects
            ]
            reader.check_unchanged()
            return found
    finally:
        torch.set_num_threads(threads)


def _weight(subject: AnalyzedWeight, measured: Measured) -> WeightAnalysis:
    step = subject.step
    dense = next(view.step for group in subject.groups for view in group.views if view.rounding is None)
    return WeightAnalysis(
        subject.name,
        subject.kind,
        subject.layer,
        step.weight.shape,
        dense.encoder.dtype.name,
        targets_of([measured]),
    )


def _merge_base(prepared: Prepared, options: AnalysisOptions) -> str | None:
    """Value that `--merge-base` needs for target T; None where T is what a merge takes anyway."""
    if prepared.base.quantized:
        return None
    return USUAL_MERGE_BASE if options.merge_base == "auto" else options.merge_base
