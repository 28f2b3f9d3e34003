"""One worker of several that make one output on a folder they share, each planning for itself.

The lock of the whole is held while a part begins, the passes included, and when it ends: so passes are carried out
once, the other workers waiting for what they find, and of the workers the last to end sees that no other is at work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from streamconv.errors import OutputError, Stopped
from streamconv.output.journal import Journal, make_pass_folder, part_at_work, remove_leftovers
from streamconv.output.parts import adopt, finished_shards, partial_bytes
from streamconv.output.place import SPARE_DISK_BYTES, check_disk
from streamconv.pipeline.contents import check_contents
from streamconv.pipeline.passes import Passed, run_passes
from streamconv.pipeline.place import check_folder, check_out, is_finished
from streamconv.pipeline.preparation import Prepared
from streamconv.pipeline.production import open_work, reading_again, write_shards
from streamconv.planning.parts import Part, share
from streamconv.planning.plan import ShardPlan
from streamconv.progress import Meter, OnProgress, OnTurn, StopRequest, Turn

LOOK_EVERY_S = 0.2
PATIENCE_S = 2.0
"""How long the lock of the whole may seem to be no part's: it names its holder an instant after it is taken."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartMade:
    """A part whose shards are complete: those that this worker made or found of its own, with their SHA-256.

    `whole` is the journal of the output, open, where this worker is the last and publishes it; else None, and `left`
    are names of shards that are still to be made, none where a worker that is still alive will publish.
    """

    shards: Sequence[ShardPlan]
    hashes: Mapping[str, str]
    resumed: bool
    peak: int
    whole: Journal | None
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A part whose lock is held: its journal, the shards that are still its own, and the results of passes."""

    journal: Journal
    shards: Sequence[ShardPlan]
    passed: Passed


def make_part(
    prepared: Prepared,
    out: Path,
    part: Part,
    stack: ExitStack,
    on_progress: OnProgress,
    stop: StopRequest,
    on_turn: OnTurn,
) -> PartMade | None:
    """Make the shards of a part, or go on with them; None where the output turns out to be in place already.

    Closing `stack` frees all locks. Raises OutputError where the part, or all of the output, is in another run's hands.
    """
    plan = prepared.plan
    mine = sum(shard.size for shard in share(plan.shards, part))
    meter = Meter(plan.passes_need.read + mine, on_progress, not plan.device.is_cpu, on_turn)
    begun = _begin(prepared, out, part, stack, meter, stop)
    if begun is None:
        return None
    # What is read again is counted as there below.
    reading = reading_again(Meter(0, lambda done, total: None), stop)
    work = open_work(prepared, out, begun.journal, begun.shards, stack, reading)
    work = replace(work, passed=begun.passed)
    meter.start(plan.passes_need.read + mine - work.size + work.there)
    write_shards([work], meter, stop)
    hashes = {shard.name: begun.journal.progress.finished[shard.name] for shard in begun.shards}
    whole = _take(prepared, out, part, stack, stop, on_turn)
    if whole is None:
        return None
    left = _left(prepared, whole)
    is_last = not left and part_at_work(whole.folder, but=part.folder) is None
    begun.journal.close()
    if is_last:
        adopt(whole)
    else:
        whole.close()
    return PartMade(begun.shards, hashes, work.resumed, meter.peak, whole if is_last else None, left)


def _begin(
    prepared: Prepared, out: Path, part: Part, stack: ExitStack, meter: Meter, stop: StopRequest
) -> _Begun | None:
    """Take the lock of a part, and see to the passes, while that of the whole is held; None where all is in place."""
    plan = prepared.plan
    with ExitStack() as until_begun:
        whole = _take(prepared, out, part, until_begun, stop, meter.on_turn)
        if whole is None:
            return None
        check_contents(prepared)
        _take_over_others(whole, part)
        journal = _take_own(prepared, out, part, whole, stack)
        done = set(whole.progress.finished)
        shards = [shard for shard in share(plan.shards, part) if shard.name not in done]
        unfinished = [shard for shard in plan.shards if shard.name not in finished_shards(whole)]
        check_disk([(out, plan, unfinished, whole)], spare_bytes=SPARE_DISK_BYTES - partial_bytes(whole))
        meter.start(0)
        passed = (
            run_passes(prepared.subject, whole.folder, meter.add, stop, meter.on_turn)
            if shards
            else Passed(plan)
        )
        return _Begun(journal, shards, passed)


def _take_over_others(whole: Journal, part: Part) -> None:
    """Keep what was made in another number of parts. Raises OutputError where a worker of those is alive."""
    holder = part_at_work(whole.folder, but=part.folder)
    if holder is not None and f" of {part.count}, " not in holder:
        raise OutputError(
            f"{whole.out} is being made in another number of parts ({holder}), and this is {part}; give all workers "
            "the same number, or wait for those to end: what they have made is kept"
        )
    adopt(whole, part.count)


def _take_own(prepared: Prepared, out: Path, part: Part, whole: Journal, stack: ExitStack) -> Journal:
    make_pass_folder(whole.folder, part.folder)
    journal = Journal(out, prepared.plan.fingerprint, resume=True, part=part.folder, worker=str(part))
    stack.callback(journal.close)
    return stack.enter_context(journal)


def _left(prepared: Prepared, whole: Journal) -> tuple[str, ...]:
    """Names of shards that nobody has finished; none once files appear under their final names."""
    if whole.is_publishing:
        return ()
    finished = finished_shards(whole)
    return tuple(shard.name for shard in prepared.plan.shards if shard.name not in finished)


def _take(
    prepared: Prepared, out: Path, part: Part, stack: ExitStack, stop: StopRequest, on_turn: OnTurn
) -> Journal | None:
    """The lock and journal of the whole, waited for while other parts have it; None where the output is in place.

    Raises OutputError where a run without parts has it, Stopped if `stop` was set.
    """
    journal = Journal(out, prepared.plan.fingerprint, resume=True, worker=str(part))
    stack.callback(journal.close)
    refused_at: float | None = None
    is_told = False
    while not _is_there(prepared, out):
        holder = journal.try_lock()
        if holder is None:
            return _opened(prepared, out, journal, stack)
        if not holder.startswith("part "):
            refused_at = refused_at or time.monotonic()
            if time.monotonic() - refused_at > PATIENCE_S:
                journal.lock()  # which says who has it
                return _opened(prepared, out, journal, stack)
        elif not is_told:
            is_told = True
            on_turn(Turn("wait"))
            _log.info("waiting for %s, which is at what all parts need", holder)
        if stop.signal_number is not None:
            raise Stopped("stopped by a signal; run the same command again to go on", stop.signal_number)
        time.sleep(LOOK_EVERY_S)
    return None


def _opened(prepared: Prepared, out: Path, journal: Journal, stack: ExitStack) -> Journal | None:
    """The journal, whose lock is held now; None where another worker has put the output in place before."""
    try:
        is_there = is_finished(prepared, out)
        if not is_there:
            check_folder(prepared, out)
    except OutputError:
        journal.close()
        remove_leftovers(out)
        raise
    if is_there:
        journal.close()
        remove_leftovers(out)
        return None
    return stack.enter_context(journal)


def _is_there(prepared: Prepared, out: Path) -> bool:
    """Whether the output is in place. Raises OutputError where it may not go there."""
    if is_finished(prepared, out):
        return True
    try:
        check_out(prepared, out)
    except OutputError:
        if is_finished(prepared, out):  # by another worker, just now
            return True
        raise
    return False
