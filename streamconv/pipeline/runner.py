"""Carries out a prepared job: resume, run the plan, weigh what is left of the fine-tune, publish, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamconv.errors import InputError, OutputError, VerificationError
from streamconv.output.journal import Journal, remove_leftovers
from streamconv.output.listing import read_listing
from streamconv.output.manifest import MANIFEST, KeptShares, Notes, Report
from streamconv.output.publish import check_placed, publish_output, set_aside
from streamconv.output.verifier import read_manifest, verify_layout, verify_output
from streamconv.pipeline.contents import check_contents, described_copies, generated_files
from streamconv.pipeline.parts import PartMade, make_part
from streamconv.pipeline.passes import PASSES, Passed
from streamconv.pipeline.place import check_out, is_finished
from streamconv.pipeline.preparation import Prepared
from streamconv.pipeline.production import OpenOutput, open_work, produce, reading_again, take_whole
from streamconv.pipeline.residual import ResidualAdapter, make_residual
from streamconv.planning.parts import Part
from streamconv.planning.plan import Plan
from streamconv.progress import Meter, OnProgress, OnTurn, StopRequest, Turn, unnoticed
from streamconv.running.device_use import in_use
from streamconv.running.schedule import bytes_read
from streamconv.storage.local import open_folder
from streamconv.system_errors import translated, was_refused

_log = logging.getLogger(__name__)


def run(
    prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest, on_turn: OnTurn = unnoticed
) -> Report:
    """Carry out a prepared job, or go on with it where an earlier run of it stopped.

    Its outputs are published together: when all are complete and have passed the gate. Of a part of an output, the
    worker that ends last publishes it; the report of another names the files that are still to be made.
    """
    with translated(out), in_use(prepared.plan.device):
        part = prepared.job.part
        if part is not None:
            return _run_part(prepared, out, part, on_progress, stop, on_turn)
        return _run(prepared, out, on_progress, stop, on_turn)


def _run(
    prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest, on_turn: OnTurn
) -> Report:
    check_out(prepared, out)
    places = prepared.places(out)
    before = [_finished_before(each, folder, on_progress, stop) for each, folder in places]
    todo = [place for place, report in zip(places, before, strict=True) if report is None]
    if todo:
        check_contents(prepared)
    now = iter(_make(todo, on_progress, stop, on_turn) if todo else ())
    main, *also = (report or next(now) for report in before)
    names = [each.job.options.quant for each in prepared.also]
    return replace(main, also=dict(zip(names, also, strict=True)))


def _run_part(
    prepared: Prepared, out: Path, part: Part, on_progress: OnProgress, stop: StopRequest, on_turn: OnTurn
) -> Report:
    """Make the shards of a part; publish the output if all others are there, and nobody else is at work."""
    started = time.monotonic()
    with ExitStack() as stack:
        made = make_part(prepared, out, part, stack, on_progress, stop, on_turn)
        if made is None:
            report = _finished_before(prepared, out, on_progress, stop)
            assert report is not None, f"{out} was in place and is not any more"
            return replace(report, part=str(part))
        if made.whole is not None:
            (report,) = _make([(prepared, out)], on_progress, stop, on_turn, made.whole)
        else:
            report = _part_report(prepared, out, made)
    return replace(report, part=str(part), seconds=time.monotonic() - started)


def _part_report(prepared: Prepared, out: Path, made: PartMade) -> Report:
    """The report of a part whose worker is not the last."""
    plan = replace(prepared.plan, shards=tuple(made.shards))
    notes = Passed(plan).notes
    read = plan.passes_need.read + bytes_read([plan])
    report = _report(prepared, out, made.hashes, None, notes, None, 0.0, made.peak, read, made.resumed)
    return replace(report, bytes_written=plan.size, left=made.left)


@dataclass(frozen=True, slots=True)
class _Published:
    """An output in place: SHA-256 of its shards, and what became of the update."""

    work: OpenOutput
    hashes: Mapping[str, str]
    kept: KeptShares | None
    residual: ResidualAdapter | None


def _make(
    todo: Sequence[tuple[Prepared, Path]],
    on_progress: OnProgress,
    stop: StopRequest,
    on_turn: OnTurn,
    last: Journal | None = None,
) -> list[Report]:
    """Make these outputs together, and publish them. `last` is the journal of one whose parts are all made."""
    started = time.monotonic()
    plans = [each.plan for each, _ in todo]
    reads = sum(plan.passes_need.read for plan in plans)
    on_gpu = not plans[0].device.is_cpu
    meter = Meter(reads + sum(plan.size for plan in plans), on_progress, on_gpu, on_turn)
    with ExitStack() as stack:
        reading = reading_again(meter, stop)
        works = [
            open_work(each, folder, last or take_whole(each, folder, stack), each.plan.shards, stack, reading)
            for each, folder in todo
        ]
        works = produce(works, meter, stop)
        on_turn(Turn("publish"))
        published = _publish(works)
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


def _publish(works: Sequence[OpenOutput]) -> list[_Published]:
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


def _verify_placed(work: OpenOutput) -> None:
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
            verify_output(storage, listing, reading_again(Meter(listing.size, on_progress), stop))
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


def _check_kept(works: Sequence[OpenOutput], shares: Sequence[KeptShares | None]) -> None:
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
