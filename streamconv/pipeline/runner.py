"""Carries out a prepared job: resume, run the plan, weigh what is left of the fine-tune, publish, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from streamconv.checkpoint.writer import ShardWriter
from streamconv.errors import InputError, OutputError, Stopped, VerificationError
from streamconv.output.journal import Journal, remove_leftovers
from streamconv.output.listing import read_listing
from streamconv.output.manifest import MANIFEST, KeptShares, Notes, Report, kept_delta
from streamconv.output.place import check_disk
from streamconv.output.publish import check_placed, publish_output, set_aside
from streamconv.output.sink import ShardSink, resume_points
from streamconv.output.verifier import read_manifest, verify_layout, verify_output
from streamconv.pipeline.arriving import arriving
from streamconv.pipeline.contents import check_contents, described_copies, generated_files
from streamconv.pipeline.passes import PASSES, Passed, run_passes
from streamconv.pipeline.place import check_folder, check_out, is_finished
from streamconv.pipeline.preparation import Prepared
from streamconv.pipeline.residual import ResidualAdapter, make_residual
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.progress import Meter, OnBytes, OnProgress, StopRequest
from streamconv.running.cell import KeptDelta
from streamconv.running.device_use import in_use
from streamconv.running.executor import run_plans
from streamconv.running.schedule import bytes_read
from streamconv.running.sink import Output
from streamconv.sizes import format_size
from streamconv.storage.local import open_folder
from streamconv.system_errors import translated, was_refused

_log = logging.getLogger(__name__)


def run(prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest) -> Report:
    """Carry out a prepared job, or go on with it where an earlier run of it stopped.

    Its outputs are published together: when all are complete and have passed the gate.
    """
    with translated(out), in_use(prepared.plan.device):
        check_out(prepared, out)
        places = prepared.places(out)
        before = [_finished_before(each, folder, on_progress, stop) for each, folder in places]
        todo = [place for place, report in zip(places, before, strict=True) if report is None]
        if todo:
            check_contents(prepared)
        now = iter(_make(todo, on_progress, stop) if todo else ())
    main, *also = (report or next(now) for report in before)
    names = [each.job.options.quant for each in prepared.also]
    return replace(main, also=dict(zip(names, also, strict=True)))


@dataclass(frozen=True, slots=True)
class _Work:
    """An output in work: from where each shard that is not finished is produced, and the writers that stand there.

    `passed` is what the passes before the plan's own made; its own plan until they are through.
    """

    prepared: Prepared
    out: Path
    journal: Journal
    starts: Mapping[str, int]
    writers: dict[str, ShardWriter]
    resumed: bool
    passed: Passed

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @property
    def unfinished(self) -> list[ShardPlan]:
        return [shard for shard in self.plan.shards if shard.name in self.starts]

    @property
    def there(self) -> int:
        """Bytes that an earlier run has left."""
        return self.plan.size - sum(shard.size - self.starts[shard.name] for shard in self.unfinished)

    def kept(self) -> KeptShares | None:
        sums = {name: KeptDelta(*sums) for name, sums in self.journal.progress.sums.items()}
        for found in self.passed.found.values():
            sums |= found.kept
        return kept_delta(sums)

    def close(self) -> None:
        for writer in self.writers.values():  # of shards that were not begun
            writer.close()


@dataclass(frozen=True, slots=True)
class _Published:
    """An output in place: SHA-256 of its shards, and what became of the update."""

    work: _Work
    hashes: Mapping[str, str]
    kept: KeptShares | None
    residual: ResidualAdapter | None


def _make(todo: Sequence[tuple[Prepared, Path]], on_progress: OnProgress, stop: StopRequest) -> list[Report]:
    """Make these outputs together, and publish them."""
    started = time.monotonic()
    plans = [each.plan for each, _ in todo]
    reads = sum(plan.passes_need.read for plan in plans)
    on_gpu = not plans[0].device.is_cpu
    meter = Meter(reads + sum(plan.size for plan in plans), on_progress, on_gpu)
    with ExitStack() as stack:
        reading = _reading(meter, stop)
        works = [_open(each, folder, stack, reading) for each, folder in todo]
        published = _publish(_produce(works, meter, stop))
    seconds, read = time.monotonic() - started, reads + bytes_read(plans)
    return [
        _report(
            each.work.prepared,
            each.work.out,
            each.hashes,
            each.kept,
            each.work.passed.notes,
            each.residual.as_json() if each.residual else None,
            seconds,
            meter.peak,
            read,
            each.work.resumed,
        )
        for each in published
    ]


def _produce(works: Sequence[_Work], meter: Meter, stop: StopRequest) -> list[_Work]:
    """Carry out the passes of these outputs, the last of them, which writes shards, in one for all.

    All shards are complete then, and none is published.
    """
    copied = max(sum(file.size for file in work.prepared.copied) for work in works)
    places = [(work.out, work.plan, work.unfinished, work.journal) for work in works]
    check_disk(places, copied_bytes=copied)
    meter.start(sum(work.there for work in works))
    done = [
        replace(work, passed=run_passes(work.prepared.subject, work.journal.folder, meter.add, stop))
        for work in works
    ]
    outputs = [
        Output(work.passed.plan, work.starts, partial(ShardSink, work.journal, work.writers)) for work in done
    ]
    with arriving(works[0].prepared, outputs) as (sources, arranged):
        run_plans(arranged, meter.add, stop, sources)
    return done


def _publish(works: Sequence[_Work]) -> list[_Published]:
    """Publish complete outputs together. Raises VerificationError where one does not pass the gate."""
    shares = [work.kept() for work in works]
    _check_kept(works, shares)
    published = [
        _Published(
            work,
            dict(work.journal.progress.finished),
            kept,
            make_residual(work.passed, work.journal.folder),
        )
        for work, kept in zip(works, shares, strict=True)
    ]
    # The main output, in whose folder the others lie, comes last.
    for each in reversed(published):
        _put_in_place(each)
    return published


def _reading(meter: Meter, stop: StopRequest) -> OnBytes:
    """The progress of reading finished work again, which raises Stopped when that is asked for."""

    def add(nbytes: int) -> None:
        meter.add(nbytes)
        if stop.signal_number is not None:
            raise Stopped("stopped by a signal; run the same command again to go on", stop.signal_number)

    return add


def _open(prepared: Prepared, out: Path, stack: ExitStack, on_bytes: OnBytes) -> _Work:
    """Take the lock of an output and find out how far it is."""
    plan = prepared.plan
    journal = Journal(out, plan.fingerprint, prepared.job.resume)
    stack.callback(journal.close)
    journal.lock()
    _check_still_free(prepared, out, journal)
    stack.enter_context(journal)
    starts, writers = resume_points(out, plan, journal, on_bytes)
    resumed = bool(journal.progress.finished or writers or journal.has_passed)
    work = _Work(prepared, out, journal, starts, writers, resumed, Passed(plan))
    stack.callback(work.close)
    if work.resumed:
        _log.info(
            "going on in %s: %s of %s are there already", out, format_size(work.there), format_size(plan.size)
        )
    return work


def _check_still_free(prepared: Prepared, out: Path, journal: Journal) -> None:
    """Raise OutputError where another run has finished here since the place was looked at."""
    try:
        check_folder(prepared, out)
    except OutputError:
        journal.close()
        remove_leftovers(out)
        raise


def _put_in_place(output: _Published) -> None:
    work, residual = output.work, output.residual
    prepared, out, journal = work.prepared, work.out, work.journal
    _log.info("all shards are complete; putting them in place in %s", out)
    copies = described_copies(prepared)
    generated = generated_files(prepared, output.hashes, output.kept, work.passed, residual, copies)
    waiting = residual.path if residual else None
    publish_output(out, work.plan, journal, prepared.copied, generated, waiting)
    if prepared.job.verify:
        _verify_placed(work)
    journal.remove()
    check_placed(journal)  # from here on nothing can reach it through the work folder


def _verify_placed(work: _Work) -> None:
    """Raise VerificationError where the output in place is not the planned one; it is no model then."""
    try:
        verify_layout(work.out, work.plan)
    except (InputError, VerificationError, OSError) as error:
        set_aside(work.journal, work.out / work.plan.completes)
        if was_refused(error):
            raise _unreadable(error) from error
        raise VerificationError(
            f"{error}; run the same command again: it makes anew what is not whole"
        ) from error


def _unreadable(error: Exception) -> OutputError:
    return OutputError(f"{error}; once it can be read, run the same command again")


def _finished_before(
    prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest
) -> Report | None:
    """The report of a run that had already ended well; a batch job may be started twice.

    Raises VerificationError where its output is not any more what it was, OutputError where it cannot be read.
    """
    if not is_finished(prepared, out):
        return None
    try:
        if prepared.job.verify:
            storage = open_folder(str(out))
            listing = read_listing(storage, MANIFEST)
            verify_output(storage, listing, _reading(Meter(listing.size, on_progress), stop))
        verify_layout(out, prepared.plan)
    except (InputError, VerificationError, OSError) as error:
        if was_refused(error):
            raise _unreadable(error) from error
        raise VerificationError(
            f"{out} was complete, and is not any more: {error}; --overwrite makes it again"
        ) from error
    remove_leftovers(out)
    found = read_manifest(open_folder(str(out)), MANIFEST)
    kept = None
    notes = {kind.told: found.get(kind.told, {}) for kind in PASSES.values() if kind.told is not None}
    if found["kept_delta"] is not None:
        weights = found["kept_by_weight"]
        kept = KeptShares(found["kept_delta"], weights, found["base_error_to_delta"])
        _check_share(prepared.plan, kept)
    hashes = {name: shard["sha256"] for name, shard in found["shards"].items()}
    residual = found.get("residual")
    read = bytes_read([prepared.plan])
    return _report(prepared, out, hashes, kept, notes, residual, 0.0, 0, read, resumed=True)


def _check_kept(works: Sequence[_Work], shares: Sequence[KeptShares | None]) -> None:
    """Raise VerificationError if an output does not pass the gate; none is published then, and all stay complete."""
    refusals, passed = [], []
    for work, kept in zip(works, shares, strict=True):
        try:
            _check_share(work.plan, kept)
            passed.append(f"--quant {work.plan.options.quant} -o {work.out}")
        except VerificationError as error:
            work.journal.reject()
            refusals.append(str(error))
    if refusals and passed:
        refusals.append(f"what passed is complete, and a run of its own publishes it: {'; '.join(passed)}")
    if refusals:
        raise VerificationError("; ".join(refusals))


# Roundings that keep small updates, instead of those that put the base's codes back.
_OTHER = {"nearest": "stochastic", "search": "adaptive", "adaptive": "stochastic"}


def _check_share(plan: Plan, kept: KeptShares | None) -> None:
    """The gate: refuse a result that lost the fine-tune, unless its rounding was asked for by name."""
    if kept is None or plan.rounding is None or kept.total >= plan.min_kept:
        return
    other = _OTHER.get(plan.rounding.name, "nearest")
    raise VerificationError(
        f"only {kept.total:.1%} of the fine-tune survives {plan.rounding.name} rounding to {plan.quant} "
        f"(limit {plan.min_kept:.0%}), so nothing was published; choose --rounding {other} or another --merge-base, "
        f"or accept it with --rounding {plan.rounding.name} without --min-kept"
    )


def _report(
    prepared: Prepared,
    out: Path,
    hashes: Mapping[str, str],
    kept: KeptShares | None,
    notes: Notes,
    residual: Mapping[str, Any] | None,
    seconds: float,
    peak: int,
    read: int,
    resumed: bool,
) -> Report:
    plan = prepared.plan
    return Report(
        out=str(out),
        quant=plan.quant or "none",
        target=plan.target.name,
        rounding=plan.rounding.name if plan.rounding else None,
        kernels=plan.kernels,
        renamed=plan.renamed,
        notes=plan.notes,
        kept_delta=kept.total if kept else None,
        kept_by_weight=kept.weights if kept else {},
        base_error_to_delta=kept.base_error_to_delta if kept else None,
        calibration=plan.calibration.as_json() if plan.calibration else None,
        calibrated=notes["calibrated"],
        rescaled=notes["rescaled"],
        residual=residual,
        shards=dict(sorted(hashes.items())),
        bytes_read=read,
        bytes_written=plan.size,
        seconds=seconds,
        peak_ram_bytes=peak,
        planned_ram_bytes=plan.peak_ram,
        resumed=resumed,
    )
