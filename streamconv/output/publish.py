"""Publishing: a finished output under its final names, config.json last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from streamconv.checkpoint.writer import (
    ShardWriter,
    fsync_folder,
    publish,
    write_error,
    write_file,
)
from streamconv.output.journal import Journal
from streamconv.output.sidecars import (
    RESIDUAL,
    RESIDUAL_CONFIG,
    RESIDUAL_TENSORS,
    is_read_by_loaders,
)
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.planning.plan import Plan
from streamconv.storage.base import SourceFile
from streamconv.storage.local import open_file

_COPY_BYTES = 4 * 2**20


INDEX = "model.safetensors.index.json"


CONFIG = "config.json"


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
        remove_file(out / stale)
    _settle_folder(out / CHAT_TEMPLATES, any(name.startswith(f"{CHAT_TEMPLATES}/") for name in names))
    _settle_folder(out / RESIDUAL, residual is not None)
    fsync_folder(out)
    for shard in plan.shards:
        if journal.finished(shard.name).exists():
            publish(journal.finished(shard.name), out / shard.name)
    if residual is not None:
        publish(residual, out / RESIDUAL_TENSORS)
    for file in copied:
        copy_file(file, out / file.name)
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


def remove_file(path: Path) -> None:
    """Remove a file that may not be there. Raises OutputError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder of that name, say
        raise write_error(error, path) from error


def copy_file(file: SourceFile, target: Path) -> None:
    """Copy a small file; beside the target first, so that the final name is never half a file."""
    temporary = target.with_name(f".{target.name}.partial")
    remove_file(temporary)
    with os.fdopen(open_file(file), "rb") as source, ShardWriter.create(temporary, b"", file.size) as writer:
        while chunk := source.read(_COPY_BYTES):
            writer.write(chunk)
        writer.finish()
    publish(temporary, target)
