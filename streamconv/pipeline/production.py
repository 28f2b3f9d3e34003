"""Making the shards of outputs: work folders opened, passes carried out, shards produced; nothing is published here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from streamconv.checkpoint.writer import ShardWriter
from streamconv.errors import OutputError, Stopped
from streamconv.output.journal import Journal, check_no_part_at_work, remove_leftovers
from streamconv.output.manifest import KeptShares, kept_delta
from streamconv.output.parts import adopt
from streamconv.output.place import check_disk
from streamconv.output.sink import ShardSink, resume_points
from streamconv.pipeline.arriving import arriving
from streamconv.pipeline.passes import Passed, run_passes
from streamconv.pipeline.place import check_folder
from streamconv.pipeline.preparation import Prepared
from streamconv.planning.plan import Plan, Rewrite, ShardPlan
from streamconv.progress import Meter, OnBytes, StopRequest, Turn
from streamconv.running.cell import KeptDelta
from streamconv.running.executor import run_plans
from streamconv.running.sink import Output
from streamconv.sizes import format_size

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenOutput:
    """An output in work: from where each shard that is not finished is produced, and the writers that stand there.

    `shards` are those that this run is to make. `passed` is what the passes before the plan's own made; its own plan
    until they are through.
    """

    prepared: Prepared
    out: Path
    journal: Journal
    shards: Sequence[ShardPlan]
    starts: Mapping[str, int]
    writers: dict[str, ShardWriter]
    resumed: bool
    passed: Passed

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @property
    def size(self) -> int:
        """Bytes of the shards that are this run's."""
        return sum(shard.size for shard in self.shards)

    @property
    def unfinished(self) -> list[ShardPlan]:
        return [shard for shard in self.shards if shard.name in self.starts]

    @property
    def there(self) -> int:
        """Bytes that an earlier run has left."""
        return self.size - sum(shard.size - self.starts[shard.name] for shard in self.unfinished)

    def kept(self) -> KeptShares | None:
        made = self.journal.progress.sums
        steps = (placed.step for shard in self.plan.shards for placed in shard.steps)
        names = (step.name for step in steps if isinstance(step, Rewrite))
        # In the plan's order, whoever was first: sums are of floats.
        ordered = {name: made[name] for name in names if name in made} | made
        sums = {name: KeptDelta(*sums) for name, sums in ordered.items()}
        for found in self.passed.found.values():
            sums |= found.kept
        return kept_delta(sums)

    def close(self) -> None:
        for writer in self.writers.values():  # of shards that were not begun
            writer.close()


def take_whole(prepared: Prepared, out: Path, stack: ExitStack) -> Journal:
    """The lock and journal of an output that this run alone makes, with what workers of parts have left."""
    journal = Journal(out, prepared.plan.fingerprint, prepared.job.resume)
    stack.callback(journal.close)
    journal.lock()
    _check_still_free(prepared, out, journal)
    stack.enter_context(journal)
    check_no_part_at_work(journal)
    adopt(journal)
    return journal


def open_work(
    prepared: Prepared,
    out: Path,
    journal: Journal,
    shards: Sequence[ShardPlan],
    stack: ExitStack,
    on_bytes: OnBytes,
) -> OpenOutput:
    """Find out how far these shards of an output are, whose journal is open."""
    starts, writers = resume_points(out, prepared.plan, journal, on_bytes, shards)
    resumed = bool(journal.progress.finished or writers or journal.has_passed)
    work = OpenOutput(prepared, out, journal, shards, starts, writers, resumed, Passed(prepared.plan))
    stack.callback(work.close)
    if work.resumed:
        _log.info(
            "going on in %s: %s of %s are there already", out, format_size(work.there), format_size(work.size)
        )
    return work


def produce(works: Sequence[OpenOutput], meter: Meter, stop: StopRequest) -> list[OpenOutput]:
    """Carry out the passes of these outputs, the last of them, which writes shards, in one for all.

    All shards are complete then, and none is published.
    """
    copied = max(sum(file.size for file in work.prepared.copied) for work in works)
    places = [(work.out, work.plan, work.unfinished, work.journal) for work in works]
    check_disk(places, copied_bytes=copied)
    meter.start(sum(work.there for work in works))
    done = [
        replace(
            work,
            passed=run_passes(work.prepared.subject, work.journal.folder, meter.add, stop, meter.on_turn),
        )
        for work in works
    ]
    write_shards(done, meter, stop)
    return done


def write_shards(works: Sequence[OpenOutput], meter: Meter, stop: StopRequest) -> None:
    """Carry out the pass that writes the shards of these outputs, those before it being through."""
    outputs = [
        Output(work.passed.plan, work.starts, partial(ShardSink, work.journal, work.writers, meter.on_turn))
        for work in works
    ]
    meter.on_turn(Turn("write"))
    with arriving(works[0].prepared, outputs) as (sources, arranged):
        run_plans(arranged, meter.add, stop, sources)


def reading_again(meter: Meter, stop: StopRequest) -> OnBytes:
    """The progress of reading finished work again, which raises Stopped when that is asked for."""

    def add(nbytes: int) -> None:
        meter.add(nbytes)
        if stop.signal_number is not None:
            raise Stopped("stopped by a signal; run the same command again to go on", stop.signal_number)

    return add


def _check_still_free(prepared: Prepared, out: Path, journal: Journal) -> None:
    """Raise OutputError where another run has finished here since the place was looked at."""
    try:
        check_folder(prepared, out)
    except OutputError:
        journal.close()
        remove_leftovers(out)
        raise
