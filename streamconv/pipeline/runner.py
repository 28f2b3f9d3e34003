"""Carries out a prepared job: resume, run the plan, weigh what is left of the fine-tune, publish, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from streamconv.cells import KeptDelta
from streamconv.errors import VerificationError
from streamconv.executor import Output, StopRequest, run_plans
from streamconv.journal import Journal, remove_leftovers
from streamconv.output import ShardSink, check_disk, publish_output, resume_points
from streamconv.pipeline.contents import generated_files
from streamconv.pipeline.job import OnProgress
from streamconv.pipeline.meter import Meter
from streamconv.pipeline.place import check_out, is_finished
from streamconv.pipeline.preparation import Prepared
from streamconv.plan import Plan
from streamconv.report.result import MANIFEST, Kept, Report, kept_delta
from streamconv.sizes import format_size
from streamconv.storage.local import open_folder
from streamconv.verifier import read_manifest, verify_layout

_log = logging.getLogger(__name__)


def run(prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest) -> Report:
    """Carry out a prepared job, or go on with it where an earlier run of it stopped."""
    started, meter = time.monotonic(), Meter(prepared.plan.size, on_progress)
    plan, job = prepared.plan, prepared.job
    check_out(prepared, out)
    if (done := _finished_before(prepared, out)) is not None:
        return done
    with Journal(out, plan.fingerprint, job.resume) as journal:
        starts, writers = resume_points(out, plan, journal)
        resumed = bool(journal.progress.finished or writers)
        check_disk(out, [shard for shard in plan.shards if shard.name in starts], journal)
        there = plan.size - sum(
            shard.size - starts[shard.name] for shard in plan.shards if shard.name in starts
        )
        if resumed:
            _log.info("going on: %s of %s are there already", format_size(there), format_size(plan.size))
        meter.start(there)
        try:
            run_plans([Output(plan, starts, lambda: ShardSink(journal, writers))], meter.add, stop)
        finally:
            for writer in writers.values():  # of shards that were not begun
                writer.close()
        sums = {name: KeptDelta(*values) for name, values in journal.progress.sums.items()}
        kept = kept_delta(sums)
        _check_kept(plan, kept, journal)
        hashes = journal.progress.finished
        _log.info("all shards are complete; putting them in place in %s", out)
        publish_output(out, plan, journal, prepared.copied, generated_files(prepared, hashes, kept))
        if job.verify:
            verify_layout(out, plan)
        journal.remove()
    return _report(prepared, out, hashes, kept, time.monotonic() - started, meter.peak, resumed)


def _finished_before(prepared: Prepared, out: Path) -> Report | None:
    """The report of a run that had already ended well; a batch job may be started twice."""
    if not is_finished(prepared, out):
        return None
    verify_layout(out, prepared.plan)
    remove_leftovers(out)
    found = read_manifest(open_folder(str(out)), MANIFEST)
    kept = None
    if found["kept_delta"] is not None:
        weights = found["kept_by_weight"]
        kept = Kept(found["kept_delta"], weights, found["base_error_to_delta"])
        _check_share(prepared.plan, kept)
    hashes = {name: shard["sha256"] for name, shard in found["shards"].items()}
    return _report(prepared, out, hashes, kept, 0.0, 0, resumed=True)


def _check_kept(plan: Plan, kept: Kept | None, journal: Journal) -> None:
    try:
        _check_share(plan, kept)
    except VerificationError:
        journal.reject()
        raise


def _check_share(plan: Plan, kept: Kept | None) -> None:
    """The gate: refuse a result that lost the fine-tune, unless its rounding was asked for by name."""
    if kept is None or plan.rounding is None or kept.total >= plan.min_kept:
        return
    other = "stochastic" if plan.rounding.name == "nearest" else "nearest"
    raise VerificationError(
        f"only {kept.total:.1%} of the fine-tune survives {plan.rounding.name} rounding to {plan.quant} "
        f"(limit {plan.min_kept:.0%}), so nothing was published; choose --rounding {other} or another --merge-base, "
        f"or accept it with --rounding {plan.rounding.name} without --min-kept"
    )


def _report(
    prepared: Prepared,
    out: Path,
    hashes: Mapping[str, str],
    kept: Kept | None,
    seconds: float,
    peak: int,
    resumed: bool,
) -> Report:
    plan = prepared.plan
    return Report(
        out=str(out),
        quant=plan.quant or "none",
        target=plan.target.name,
        rounding=plan.rounding.name if plan.rounding else None,
        renamed=plan.renamed,
        kept_delta=kept.total if kept else None,
        kept_by_weight=kept.weights if kept else {},
        base_error_to_delta=kept.base_error_to_delta if kept else None,
        shards=dict(sorted(hashes.items())),
        bytes_read=plan.bytes_read,
        bytes_written=plan.size,
        seconds=seconds,
        peak_ram_bytes=peak,
        planned_ram_bytes=plan.memory.ram,
        resumed=resumed,
    )
