"""Publishing: a finished output under its final names, last what completes it: config.json, or the first GGUF file.

Small files are written in the work folder and renamed into place like shards, and what makes way is renamed into it
before it is deleted. So once that folder is gone a run can put nothing in place and take nothing away, however late it
notices: without working locks, two runs could otherwise mix what they publish.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from streamconv.checkpoint.container import CONFIG, is_gguf_output
from streamconv.checkpoint.own_files import (
    FileIdentity,
    check_kind,
    identify,
    kind_at,
    known_again,
    read_error,
)
from streamconv.checkpoint.writer import (
    ShardWriter,
    fsync_folder,
    publish,
    remove_file,
    write_anew,
    write_error,
)
from streamconv.errors import CheckpointError, OutputError
from streamconv.output.journal import Journal
from streamconv.output.sidecars import (
    RESIDUAL,
    RESIDUAL_CONFIG,
    RESIDUAL_TENSORS,
    is_read_by_loaders,
)
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.output.work_folder import REPLACED
from streamconv.planning.plan import Plan
from streamconv.storage.base import SourceFile
from streamconv.storage.local import FOLDER, LINK, close_quietly, list_folder, open_file, reading

INDEX = "model.safetensors.index.json"

_COPY_BYTES = 4 * 2**20


def publish_output(
    out: Path,
    plan: Plan,
    journal: Journal,
    copied: tuple[SourceFile, ...],
    generated: Mapping[str, bytes],
    residual: Path | None = None,
) -> None:
    """Put the finished output under its final names; can be repeated after an interruption.

    `generated` are small files by name: written in the order given, index and config after all shards, but before a
    shard that completes the output. `residual` is
    where the tensors of a residual adapter wait. Raises OutputError where another run has taken over, or what was
    finished is not there any more: what would complete it is not in place then.
    """
    _check_waiting(out, plan, journal)
    journal.publish()
    names = {shard.name for shard in plan.shards} | set(generated) | {file.name for file in copied}
    names |= {RESIDUAL_TENSORS} if residual else set()
    # What makes a folder a model goes first, so that old and new are never taken for one model.
    last = [shard for shard in plan.shards if shard.name == plan.completes]
    waiting = [shard.name for shard in last if kind_at(journal.finished(shard.name)) is not None]
    for stale in (CONFIG, INDEX, *waiting, *_of_old_model(out, names)):
        set_aside(journal, out / stale)
    _settle_folder(out / CHAT_TEMPLATES, any(name.startswith(f"{CHAT_TEMPLATES}/") for name in names))
    _settle_folder(out / RESIDUAL, residual is not None)
    fsync_folder(out)
    placed = journal.placed
    placed.clear()
    for shard in plan.shards:
        if shard not in last:
            placed[out / shard.name] = _put_shard(out, journal, shard.name)
    if residual is not None:
        put_file(journal, residual, out / RESIDUAL_TENSORS)
        if identity := identify(out / RESIDUAL_TENSORS, lambda _: None):
            placed[out / RESIDUAL_TENSORS] = identity
    for file in copied:
        placed[out / file.name] = put_copy(journal, file, out / file.name)
    for name, content in generated.items():
        if name == CONFIG:
            check_placed(journal)
        placed[out / name] = put_content(journal, content, out / name)
    for shard in last:
        check_placed(journal)
        placed[out / shard.name] = _put_shard(out, journal, shard.name)
    journal.check_owner()
    try:
        check_placed(journal)
    except OutputError:
        set_aside(journal, out / plan.completes)
        raise


def set_aside(journal: Journal, path: Path) -> None:
    """Remove a file of the output's folder, or a link, by way of the work folder; it may not be there."""
    journal.check_owner()
    kind, aside = kind_at(path), journal.folder / REPLACED / path.name
    if kind == FOLDER:
        raise write_error(IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)), path)
    try:
        if kind is not None:
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
    except OSError as error:
        raise write_error(error, path) from error
    remove_file(aside)


def _check_waiting(out: Path, plan: Plan, journal: Journal) -> None:
    """Raise OutputError where a shard has gone since it was finished, before anything makes way for it."""
    journal.check_owner()
    for shard in plan.shards:
        waiting = journal.finished(shard.name)
        is_placed = journal.is_publishing and kind_at(waiting) is None
        journal.check_finished(shard.name, out / shard.name if is_placed else waiting)


def _put_shard(out: Path, journal: Journal, name: str) -> FileIdentity:
    waiting = journal.finished(name)
    if kind_at(waiting) is not None:
        journal.check_finished(name, waiting)
        put_file(journal, waiting, out / name)
    journal.check_finished(name, out / name)
    return journal.identities[name]


def check_placed(journal: Journal) -> None:
    """Raise OutputError where a final name is not that of the file which was put there."""
    for path, identity in journal.placed.items():
        if known_again(path, identity) is None:
            raise OutputError(
                f"{path} was removed or changed while the output was being put in place, so this is no model yet; run"
                " the same command again, with nothing else at work there"
            )


def put_file(journal: Journal, source: Path, target: Path) -> None:
    """Give a finished file of the work folder its final name, unless the folder is another run's by now."""
    journal.check_owner()
    publish(source, target)


def put_content(journal: Journal, content: bytes, target: Path) -> FileIdentity:
    """Write a small file and put it in place, whole or not at all."""
    temporary = _waiting(journal, target)
    journal.check_owner()
    identity = write_anew(temporary, content)
    put_file(journal, temporary, target)
    return identity


def put_copy(journal: Journal, file: SourceFile, target: Path) -> FileIdentity:
    """Copy a file and put it in place, whole or not at all."""
    temporary = _waiting(journal, target)
    journal.check_owner()
    remove_file(temporary)
    source = open_file(file)
    try:
        with ShardWriter.create(temporary, b"", file.size) as writer:
            while chunk := _read(source, file):
                writer.write(chunk)
            if writer.offset < file.size:
                raise CheckpointError(
                    f"{file.name} ({file.path}) ends at byte {writer.offset} of {file.size}; was it cut short while in "
                    "use?"
                )
            writer.finish()
    finally:
        close_quietly(source)
    put_file(journal, temporary, target)
    return writer.identity


def _read(source: int, file: SourceFile) -> bytes:
    """The next part of a file that is copied. Raises CheckpointError where it cannot be read."""
    with reading(f"{file.name} ({file.path})"):
        return os.read(source, _COPY_BYTES)


def _waiting(journal: Journal, target: Path) -> Path:
    return journal.folder / f".{target.name}.partial"


def _of_old_model(out: Path, keep: set[str]) -> list[str]:
    """Files of the model that was here which a loader would take for the new one's."""
    found = _not_kept(out, "", keep)
    for name in (CHAT_TEMPLATES, RESIDUAL):
        kind = kind_at(out / name)
        if kind == LINK:  # what it leads to is not of this folder
            found.append(name)
        elif kind == FOLDER:
            found += _not_kept(out / name, f"{name}/", keep)
    return found


def _not_kept(folder: Path, prefix: str, keep: set[str]) -> list[str]:
    try:
        names = [prefix + path.name for path in list_folder(folder)]
    except OSError as error:
        raise read_error(error, folder) from error
    return [name for name in names if is_of_model(name) and name not in keep]


def _settle_folder(folder: Path, is_used: bool) -> None:
    """Make the folder if it is used; else remove it, unless something of somebody else is in it."""
    if is_used:
        check_kind(folder, FOLDER)
    try:
        if is_used:
            folder.mkdir(exist_ok=True)
        elif kind_at(folder) == FOLDER and not list_folder(folder):
            folder.rmdir()
    except OSError as error:
        raise write_error(error, folder) from error


def is_of_model(name: str) -> bool:
    """Whether a loader takes a file of this name, wherever it finds it beside others, for a part of their model."""
    if name.startswith(f"{RESIDUAL}/"):
        return name in (RESIDUAL_CONFIG, RESIDUAL_TENSORS)
    return (
        name.endswith((".safetensors", ".safetensors.index.json"))
        or is_gguf_output(name)
        or is_read_by_loaders(name)
    )
