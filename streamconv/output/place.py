"""The place of an output: what may stand in its folder, and the disk that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamconv.checkpoint.container import CONFIG, is_gguf_output
from streamconv.checkpoint.own_files import read_error
from streamconv.checkpoint.writer import free_bytes
from streamconv.errors import OutputError, ResourceError
from streamconv.formats import FORMATS
from streamconv.output.journal import WORK_FOLDER, Journal
from streamconv.output.manifest import MANIFEST
from streamconv.planning.plan import Plan, ShardPlan
from streamconv.sizes import format_size
from streamconv.storage.local import list_folder
from streamconv.system_errors import lacking

SPARE_DISK_BYTES = 64 * 2**20
"""Index, tokenizer, journal, and what the file system adds."""


def folder_of(quant: str) -> str:
    """Name of the folder in an output that is for a further one in this format."""
    return quant.replace(":", "-")


FURTHER_FORMATS = ("none", *FORMATS)
"""Formats that a further output can have."""

# Files of a repository that waits for its model.
_OF_A_REPOSITORY = {".git", ".gitattributes", ".gitignore", "README.md", "LICENSE"}
OUTPUT_FOLDERS = tuple(map(folder_of, FURTHER_FORMATS))
"""Names of the folders in an output that are for further ones, each a model of its own."""


def check_reachable(out: Path) -> None:
    """Raise OutputError where the name of an output leads nowhere, so that no folder could be made there."""
    try:
        out.stat()
    except FileNotFoundError as error:
        if out.is_symlink():
            raise OutputError(
                f"{out} is a link to {out.readlink()}, which is not there; make that folder, or choose another --out"
            ) from error
    except OSError as error:  # a loop of links, a file for a folder, a name too long
        raise lacking(error) or OutputError(
            f"{out} cannot be used: {error.strerror}; choose another --out"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise OutputError(f"{str(out)!r} cannot be a folder: {error}; choose another --out") from error


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
    others = [
        entry.name
        for entry in list_folder(out)
        if entry.name != WORK_FOLDER and not _is_further_output(entry)
    ]
    weights = [name for name in others if name.endswith(".safetensors")] if CONFIG not in others else []
    missing = CONFIG if weights else MANIFEST
    weights += [name for name in others if is_gguf_output(name)] if MANIFEST not in others else []
    if overwrite and weights:
        # Old weights go when the new ones come; a collection of other things must not.
        raise OutputError(
            f"{out} holds {weights[0]} but no {missing}, so it is no model that --overwrite could replace; choose "
            "another --out, or delete that if it is what an interrupted run has left"
        )
    strange = [name for name in others if name not in _OF_A_REPOSITORY]
    if overwrite and strange and not {CONFIG, MANIFEST} & {*others}:
        raise OutputError(
            f"{out} holds {', '.join(strange[:3])}{' ...' if len(strange) > 3 else ''} and no model, so there is none "
            "that --overwrite could replace; choose another --out, or an empty folder"
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


def check_disk(
    outputs: Sequence[tuple[Path, Plan, Sequence[ShardPlan], Journal]],
    spare_bytes: int = SPARE_DISK_BYTES,
    copied_bytes: int = 0,
) -> None:
    """Raise ResourceError unless what is still to be written of each plan fits the file systems that outputs lie on:
    these shards, what passes before make, `copied_bytes` of files that go along, and `spare_bytes` for each.
    """
    # What is spared has room for the files of any tokenizer, but not for whatever lies beside a stranger's weights.
    spare_bytes += max(0, copied_bytes - SPARE_DISK_BYTES // 2)
    needed: dict[int, int] = {}
    for out, plan, shards, journal in outputs:
        disk = _disk_of(out)
        needed[disk] = needed.get(disk, 0) + spare_bytes + _disk_need(plan, shards, journal)
        free = free_bytes(out / WORK_FOLDER)
        if needed[disk] > free:
            what = f"{out} with the other outputs" if len(outputs) > 1 else f"{out}"
            raise ResourceError(
                f"{what} needs {format_size(needed[disk])} and its disk has {format_size(free)} free: "
                f"{format_size(needed[disk] - free)} are missing; free some, or choose another --out"
            )


def _disk_of(out: Path) -> int:
    try:
        return out.stat().st_dev
    except OSError as error:
        raise read_error(error, out) from error


def _disk_need(plan: Plan, shards: Sequence[ShardPlan], journal: Journal) -> int:
    missing = sum(max(0, shard.size - _taken(journal.partial(shard.name))) for shard in shards)
    made = [_taken_in(journal.folder / each.folder) for each in plan.passes]
    kept = sum(max(0, each.kept_bytes - there) for each, there in zip(plan.passes, made, strict=True))
    # What passes hold, such as activations, is gone when the shards are written.
    passes = max(0, plan.passes_need.disk - sum(made)) if kept else 0
    return max(passes, kept + missing + plan.residual_bytes)


def _taken_in(folder: Path) -> int:
    try:
        return sum(map(_taken, list_folder(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise read_error(error, folder) from error


def _taken(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise read_error(error, path) from error
