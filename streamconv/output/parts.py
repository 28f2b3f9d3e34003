"""Parts put together: what workers have made of an output, each in a folder and journal of its own, becomes one run's.

    OUT/.streamconv/                  lock, plan.json and journal.jsonl of the whole; its lock is held while a part
                                      begins or ends, while passes are carried out, and while the output is published
    OUT/.streamconv/part-K-of-N/      lock, plan.json and journal.jsonl of a part, and its shards; its lock is held for
                                      as long as its worker is alive

Whoever holds the lock of the whole, and sees that those of the parts are free, may take over what these have left: a
line in the journal of the whole, then a rename. It may be interrupted anywhere and repeated.
"""

from __future__ import annotations

from pathlib import Path

from streamconv.checkpoint.own_files import kind_at, size_of
from streamconv.checkpoint.writer import publish
from streamconv.output.journal import Journal
from streamconv.output.journal_lines import Progress, Watermark, fingerprint_digest, read_lines
from streamconv.output.work_folder import LINES, part_folders, remove_part
from streamconv.storage.local import FILE, list_folder


def progress_of(journal: Journal, part: Path) -> Progress:
    """Progress that a part's own journal records, if it is of the run of `journal`, the whole's."""
    return read_lines(part / LINES, fingerprint_digest(journal.fingerprint)).progress


def finished_shards(journal: Journal) -> set[str]:
    """Names of the shards that are finished in the whole or in any part. Raises OutputError."""
    found = set(journal.progress.finished)
    for part in part_folders(journal.folder):
        found |= progress_of(journal, part).finished.keys()
    return found


def partial_bytes(journal: Journal) -> int:
    """Bytes on disk of shards that parts have not finished. Raises OutputError."""
    paths = (path for part in part_folders(journal.folder) for path in list_folder(part))
    return sum(size_of(path) or 0 for path in paths if path.suffix == ".partial")


def adopt(journal: Journal, count: int | None = None) -> None:
    """Take over what parts have made; where `count` is given, those alone that are not of so many parts.

    None of their workers may be alive. Raises OutputError.
    """
    for part in part_folders(journal.folder):
        if count is None or not part.name.endswith(f"-of-{count}"):
            _adopt(journal, part)
            remove_part(part)


def _adopt(journal: Journal, part: Path) -> None:
    progress = progress_of(journal, part)
    sums = progress.sums
    for shard, sha256 in progress.finished.items():
        if shard not in journal.progress.finished:
            journal.finish(shard, sha256, sums)
            sums = {}
        whole = journal.finished(shard)
        waiting = [path for path in (part / shard, part / f"{shard}.partial") if kind_at(path) == FILE]
        if waiting and kind_at(whole) is None:
            publish(waiting[0], whole)
        if shard in progress.sightings:
            journal.sightings[shard] = progress.sightings[shard]
    for shard, mark in progress.watermarks.items():
        partial = part / f"{shard}.partial"
        if shard in journal.progress.finished or kind_at(partial) != FILE:
            continue
        own = journal.progress.watermarks.get(shard, Watermark(0, ""))
        if own.offset < mark.offset:
            journal.watermark(shard, mark, sums)
            sums = {}
        if own.offset <= mark.offset:
            publish(partial, journal.partial(shard))
