"""The sink of a local folder: shards in the work folder, journaled as far as they are on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from streamconv.checkpoint.own_files import identify, kind_at, recognize, size_of
from streamconv.checkpoint.writer import (
    Mark,
    ShardWriter,
    publish,
    remove_file,
)
from streamconv.output.journal import Journal, Watermark
from streamconv.output.publish import set_aside
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.progress import OnBytes, OnTurn, Turn, unnoticed
from streamconv.running.cell import KeptDelta
from streamconv.threads import Future, Pool

WATERMARK_BYTES = 256 * 2**20


class ShardSink:
    """Writes shards into the work folder and journals how far they are.

    Waiting for the disk is left to a thread of its own: a shard is written while the last watermark, or the end of
    the shard before, is brought to the disk. One at a time, so that no more than a watermark is ever in the air.
    """

    def __init__(
        self, journal: Journal, resumed: dict[str, ShardWriter], on_turn: OnTurn = unnoticed
    ) -> None:
        """`resumed` are writers that stand where their shard goes on; those that are begun are taken out."""
        self._journal = journal
        self._on_turn = on_turn
        self._resumed = resumed
        self._sums: dict[str, list[float]] = {}
        self._shard: ShardPlan | None = None
        self._writer: ShardWriter | None = None
        self._marked = 0
        self._boundary = 0
        self._syncer = Pool(1, "sync")
        self._syncing: Future[None] | None = None

    def begin(self, shard: ShardPlan) -> None:
        self._journal.check_owner()
        self._shard = shard
        self._writer = self._resumed.pop(shard.name, None)
        if self._writer is None:
            path = self._journal.partial(shard.name)
            remove_file(path)
            self._writer = ShardWriter.create(path, shard.header, shard.size, shard.same_as, direct=True)
        self._marked = self._boundary = self._writer.offset

    def write(self, data: memoryview, release: Callable[[], None]) -> None:
        assert self._writer is not None
        self._writer.write(data, release)

    def boundary(self, sums: Mapping[str, KeptDelta]) -> None:
        assert self._writer is not None
        self._sums |= {name: [kept.kept, kept.delta, kept.base_error] for name, kept in sums.items()}
        self._boundary = self._writer.offset
        if self._boundary - self._marked >= WATERMARK_BYTES:
            self._mark()

    def end(self) -> None:
        assert self._shard is not None
        assert self._writer is not None
        self._sync(partial(self._finish, self._shard.name, self._writer, self._sums))
        self._sums, self._writer = {}, None

    def halt(self) -> None:
        if self._writer is not None and self._writer.offset == self._boundary > self._marked:
            self._mark()

    def drain(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def close(self) -> None:
        """Close the shard that is still open, on success and on failure."""
        self._syncer.shutdown()
        if self._writer is not None:
            self._writer.close()

    def _mark(self) -> None:
        assert self._shard is not None
        assert self._writer is not None
        self._sync(partial(self._watermark, self._shard.name, self._writer, self._writer.mark(), self._sums))
        self._sums = {}
        self._marked = self._boundary

    def _sync(self, work: Callable[[], None]) -> None:
        """Have `work` done when what was asked for before is done; raises what went wrong with that."""
        self.drain()
        self._syncing = self._syncer.submit(work)

    # -- syncing thread ------------------------------------------------------------------------------------

    def _watermark(self, name: str, writer: ShardWriter, mark: Mark, sums: Mapping[str, list[float]]) -> None:
        self._journal.watermark(name, Watermark(mark.offset, writer.sync(mark)), sums)

    def _finish(self, name: str, writer: ShardWriter, sums: Mapping[str, list[float]]) -> None:
        sha256 = writer.finish()
        self._journal.identities[name] = writer.identity
        self._journal.finish(name, sha256, sums)
        publish(self._journal.partial(name), self._journal.finished(name))
        self._on_turn(Turn(name, writer.identity.size))


def resume_points(
    out: Path,
    plan: Plan,
    journal: Journal,
    on_bytes: OnBytes = lambda _: None,
    shards: Sequence[ShardPlan] | None = None,
) -> tuple[dict[str, int], dict[str, ShardWriter]]:
    """File offset from which each unfinished shard is to be produced, and the writers that stand there.

    Of `shards`, where these are given, else of all. Finished shards are read again, unless the part that made them says
    by what to know them, and made anew where they are not what was journaled; `on_bytes` is told how many bytes were
    read.
    """
    starts: dict[str, int] = {}
    writers: dict[str, ShardWriter] = {}
    kept = _finished(out, plan, journal, on_bytes)
    for shard in plan.shards if shards is None else shards:
        if shard.name in kept:
            continue
        if shard.name in journal.progress.finished:
            journal.restart(shard.name)
        mark = journal.progress.watermarks.get(shard.name)
        starts[shard.name] = len(shard.header)
        if mark is None:
            continue
        path = journal.partial(shard.name)
        writer = ShardWriter.resume(path, shard.header, shard.size, mark.offset, mark.sha256, direct=True)
        if writer is None:
            journal.restart(shard.name)  # the bytes are not what was journaled: this shard starts anew
        else:
            starts[shard.name] = mark.offset
            writers[shard.name] = writer
    return starts, writers


def _finished(out: Path, plan: Plan, journal: Journal, on_bytes: OnBytes) -> set[str]:
    """Names of shards that are still what was journaled."""
    named = [shard for shard in plan.shards if shard.name in journal.progress.finished]
    kept = {shard.name for shard in named if _take_finished(out, shard, journal, on_bytes)}
    if len(kept) < len(named) and journal.is_publishing:
        # Without its shard, what is there must be no model; a shard that would make it one is made anew.
        is_in_place = plan.completes in kept and kind_at(journal.finished(plan.completes)) is None
        set_aside(journal, out / plan.completes)
        kept -= {plan.completes} if is_in_place else set()
    return kept


def _take_finished(out: Path, shard: ShardPlan, journal: Journal, on_bytes: OnBytes) -> bool:
    """Whether the shard is still what was journaled, under one of the names it may have by now."""
    name, sha256 = shard.name, journal.progress.finished[shard.name]
    places = [journal.finished(name), journal.partial(name)]
    # Before publishing, what stands under the final name is the model that --overwrite will replace.
    places += [out / name] if journal.is_publishing else []
    for path in places:
        if not _has_size(path, shard.size):
            continue
        seen = journal.sightings.get(name)
        found = (recognize(path, seen, sha256) if seen else None) or identify(path, on_bytes)
        if found is None or found.sha256 != sha256 or found.size != shard.size:
            continue
        journal.identities[name] = found
        if path == journal.partial(name):
            publish(path, journal.finished(name))
        return True
    return False


def _has_size(path: Path, size: int) -> bool:
    """Whether there is a regular file of that size, so that no other is read whole. Raises OutputError."""
    return size_of(path) == size
