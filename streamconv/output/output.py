"""The output folder: what may be there already, what a rerun goes on from, and how the result appears.

Nothing stands under a final name before everything is complete: shards wait in the work folder, then shards,
copied files, index, manifest and config.json are put in place, in this order, each by one rename. A folder
without config.json passes for no model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from streamconv.checkpoint.writer import (
    Mark,
    ShardWriter,
    free_bytes,
    fsync_folder,
    publish,
    write_error,
    write_file,
)
from streamconv.errors import OutputError, ResourceError
from streamconv.formats import FORMATS
from streamconv.output.journal import WORK_FOLDER, Journal, Watermark
from streamconv.output.sidecars import (
    CHAT_TEMPLATES,
    RESIDUAL,
    RESIDUAL_CONFIG,
    RESIDUAL_TENSORS,
    is_read_by_loaders,
)
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.running.cells import KeptDelta
from streamconv.sizes import format_size
from streamconv.storage.base import SourceFile
from streamconv.storage.local import open_file

WATERMARK_BYTES = 256 * 2**20
_COPY_BYTES = 4 * 2**20
_SPARE_DISK_BYTES = 64 * 2**20  # index, tokenizer, journal, and what the file system adds
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
OUTPUT_FOLDERS = ("none", *FORMATS)
"""Names of the folders in an output that are for further ones, each a model of its own."""


class ShardSink:
    """Writes shards into the work folder and journals how far they are.

    Waiting for the disk is left to a thread of its own: a shard is written while the last watermark, or the end of
    the shard before, is brought to the disk. One at a time, so that no more than a watermark is ever in the air.
    """

    def __init__(self, journal: Journal, resumed: dict[str, ShardWriter]) -> None:
        """`resumed` are writers that stand where their shard goes on; those that are begun are taken out."""
        self._journal = journal
        self._resumed = resumed
        self._sums: dict[str, list[float]] = {}
        self._shard: ShardPlan | None = None
        self._writer: ShardWriter | None = None
        self._marked = 0
        self._boundary = 0
        self._syncer = ThreadPoolExecutor(1, "streamconv-sync")
        self._syncing: Future[None] | None = None

    def begin(self, shard: ShardPlan) -> None:
        self._shard = shard
        self._writer = self._resumed.pop(shard.name, None)
        if self._writer is None:
            path = self._journal.partial(shard.name)
            _remove(path)
            self._writer = ShardWriter.create(path, shard.header, shard.size, shard.same_as)
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
        self._journal.finish(name, writer.finish(), sums)
        publish(self._journal.partial(name), self._journal.finished(name))


def check_place(out: Path, inputs: Mapping[str, Path], overwrite: bool, publishing: bool) -> None:
    """Raise OutputError if `out` cannot be written to: it overlaps an input, or holds what may not be replaced."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is not a folder; choose another --out")
    real = out.resolve()
    for role, path in inputs.items():
        if real == path or path in real.parents or real in path.parents:
            raise OutputError(
                f"--out {out} and the {role} {path} overlap, and inputs are never written to; choose another --out"
            )
    if not out.is_dir() or publishing:
        return
    others = sorted(
        entry.name for entry in out.iterdir() if entry.name != WORK_FOLDER and not _is_further_output(entry)
    )
    weights = [name for name in others if name.endswith(".safetensors")]
    if overwrite and weights and CONFIG not in others:
        # Old weights go when the new ones come; a collection of other things must not.
        raise OutputError(
            f"{out} holds {weights[0]} but no {CONFIG}, so it is no model that --overwrite could replace; choose "
            "another --out"
        )
    if others and not overwrite:
        raise OutputError(
            f"{out} is not empty ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}); choose another "
            "--out, or pass --overwrite to replace the model in it once the new one is complete"
        )


def _is_further_output(entry: Path) -> bool:
    """Whether it is where `--also` puts a model of its own, which a run for the folder above leaves alone."""
    return entry.name in OUTPUT_FOLDERS and entry.is_dir()


def check_apart(out: Path, further: Sequence[Path]) -> None:
    """Raise OutputError where links make outputs lie in one another, other than the `further` ones in `out`."""
    real = {folder: folder.resolve() for folder in (out, *further)}
    for one, other in itertools.permutations(real, 2):
        is_meant = one == out and real[other] == real[out] / other.name
        if real[one] == real[other] or (real[one] in real[other].parents and not is_meant):
            raise OutputError(
                f"{other} leads to {real[other]}, and {one} to {real[one]}: outputs must lie apart; remove such a "
                "link, or choose another --out"
            )


def check_disk(outputs: Sequence[tuple[Path, Plan, Sequence[ShardPlan], Journal]]) -> None:
    """Raise ResourceError unless what is still to be written of each plan fits the file systems that outputs lie on:
    these shards, and what a calibration leaves.
    """
    needed: dict[int, int] = {}
    for out, plan, shards, journal in outputs:
        disk = out.stat().st_dev
        needed[disk] = needed.get(disk, 0) + _disk_need(plan, shards, journal)
        free = free_bytes(out / WORK_FOLDER)
        if needed[disk] > free:
            what = f"{out} with the other outputs" if len(outputs) > 1 else f"{out}"
            raise ResourceError(
                f"{what} needs {format_size(needed[disk])} and its disk has {format_size(free)} free: "
                f"{format_size(needed[disk] - free)} are missing; free some, or choose another --out"
            )


def _disk_need(plan: Plan, shards: Sequence[ShardPlan], journal: Journal) -> int:
    missing = sum(max(0, shard.size - _taken(journal.partial(shard.name))) for shard in shards)
    need = plan.calibration.need if plan.calibration else None
    if need is None:
        return _SPARE_DISK_BYTES + missing
    made = sum(map(_taken, journal.calibration.iterdir())) if journal.calibration.exists() else 0
    chosen = sum(map(_taken, journal.rescaling.iterdir())) if journal.rescaling.exists() else 0
    # Activations are gone when the shards are written.
    codes, scales = max(0, plan.calibrated_bytes - made), max(0, plan.scaling_bytes - chosen)
    passes = max(0, need.disk - made - chosen) if codes or scales else 0
    return _SPARE_DISK_BYTES + max(passes, codes + scales + missing + plan.residual_bytes)


def _taken(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def resume_points(out: Path, plan: Plan, journal: Journal) -> tuple[dict[str, int], dict[str, ShardWriter]]:
    """File offset from which each unfinished shard is to be produced, and the writers that stand there."""
    starts: dict[str, int] = {}
    writers: dict[str, ShardWriter] = {}
    for shard in plan.shards:
        if shard.name in journal.progress.finished:
            partial = journal.partial(shard.name)
            if _is_whole(partial, shard):
                publish(partial, journal.finished(shard.name))
            # Before publishing, what stands under the final name is the model that --overwrite will replace.
            published = journal.progress.publishing and _is_whole(out / shard.name, shard)
            if published or _is_whole(journal.finished(shard.name), shard):
                continue
            journal.restart(shard.name)
        mark = journal.progress.watermarks.get(shard.name)
        starts[shard.name] = len(shard.header)
        if mark is None:
            continue
        path = journal.partial(shard.name)
        writer = ShardWriter.resume(path, shard.header, shard.size, mark.offset, mark.sha256)
        if writer is None:
            journal.restart(shard.name)  # the bytes are not what was journaled: this shard starts anew
        else:
            starts[shard.name] = mark.offset
            writers[shard.name] = writer
    return starts, writers


def _is_whole(path: Path, shard: ShardPlan) -> bool:
    return path.exists() and path.stat().st_size == shard.size


def publish_output(
    out: Path,
    plan: Plan,
    journal: Journal,
    copied: tuple[SourceFile, ...],
    generated: Mapping[str, bytes],
    residual: Path | None = None,
) -> None:
    """Put the finished output under its final names; can be repeated after an interruption.

    `generated` are small files by name: written in the order given, index and config after all shards. `residual` is
    where the tensors of a residual adapter wait.
    """
    journal.publish()
    names = {shard.name for shard in plan.shards} | set(generated) | {file.name for file in copied}
    names |= {RESIDUAL_TENSORS} if residual else set()
    # What makes a folder a model goes first, so that old and new are never taken for one model.
    for stale in (CONFIG, INDEX, *_of_old_model(out, names)):
        _remove(out / stale)
    _settle_folder(out / CHAT_TEMPLATES, any(name.startswith(f"{CHAT_TEMPLATES}/") for name in names))
    _settle_folder(out / RESIDUAL, residual is not None)
    fsync_folder(out)
    for shard in plan.shards:
        if journal.finished(shard.name).exists():
            publish(journal.finished(shard.name), out / shard.name)
    if residual is not None:
        publish(residual, out / RESIDUAL_TENSORS)
    for file in copied:
        _copy(file, out / file.name)
    for name, content in generated.items():
        write_file(out / name, content)


def _of_old_model(out: Path, keep: set[str]) -> list[str]:
    """Files of the model that was here which a loader would take for the new one's."""
    found = _not_kept(out, "", keep)
    for name in (CHAT_TEMPLATES, RESIDUAL):
        folder = out / name
        if folder.is_symlink():  # what it leads to is not of this folder
            found.append(name)
        elif folder.is_dir():
            found += _not_kept(folder, f"{name}/", keep)
    return found


def _not_kept(folder: Path, prefix: str, keep: set[str]) -> list[str]:
    names = [prefix + entry.name for entry in folder.iterdir()]
    return [name for name in names if is_of_model(name) and name not in keep]


def _settle_folder(folder: Path, is_used: bool) -> None:
    """Make the folder if it is used; else remove it, unless something of somebody else is in it."""
    try:
        if is_used:
            folder.mkdir(exist_ok=True)
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise write_error(error, folder) from error


def is_of_model(name: str) -> bool:
    """Whether a loader takes a file of this name, wherever it finds it beside others, for a part of their model."""
    if name.startswith(f"{RESIDUAL}/"):
        return name in (RESIDUAL_CONFIG, RESIDUAL_TENSORS)
    return name.endswith((".safetensors", ".safetensors.index.json")) or is_read_by_loaders(name)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder of that name, say
        raise write_error(error, path) from error


def _copy(file: SourceFile, target: Path) -> None:
    """Copy a small file; beside the target first, so that the final name is never half a file."""
    temporary = target.with_name(f".{target.name}.partial")
    _remove(temporary)
    with os.fdopen(open_file(file), "rb") as source, ShardWriter.create(temporary, b"", file.size) as writer:
        while chunk := source.read(_COPY_BYTES):
            writer.write(chunk)
        writer.finish()
    publish(temporary, target)
