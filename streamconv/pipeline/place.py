"""Places of a job's results: whether these may go there, and whether they are there already."""

from __future__ import annotations

import filecmp
import json
import os
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.output.journal import is_owned, is_publishing
from streamconv.output.manifest import MANIFEST
from streamconv.output.place import OUTPUT_FOLDERS, check_apart, check_place
from streamconv.pipeline.preparation import Prepared


def check_out(prepared: Prepared, out: Path) -> None:
    """Raise OutputError if the job may not write to `out` or to the folder of a further output.

    Such a one overlaps an input or another output, or holds something else.
    """
    inputs = {"base": Path(prepared.job.base).expanduser().resolve()}
    for number, adapter in enumerate(prepared.job.adapters):
        inputs["adapter" if not number else f"adapter {number + 1}"] = Path(adapter).expanduser().resolve()
    places = prepared.places(out)
    try:
        for each, folder in places:
            is_ours = is_publishing(folder) or _has_same_output(each, folder)
            check_place(folder, inputs, prepared.job.overwrite, is_ours)
        check_apart(out, [folder for _, folder in places[1:]])
    except OSError as error:  # no permission to look, a name too long
        raise OutputError(f"{out} cannot be used: {error.strerror}; choose another --out") from error


def unfinished(prepared: Prepared, out: Path) -> list[tuple[Prepared, Path]]:
    """The outputs that are not there yet, with their folders."""
    return [(each, folder) for each, folder in prepared.places(out) if not is_finished(each, folder)]


def further_outputs(out: Path) -> list[Path]:
    """Folders of finished further outputs in `out`."""
    # Unlike that of Path, this does not fail where nothing may be looked at.
    return [folder for name in OUTPUT_FOLDERS if os.path.isfile((folder := out / name) / MANIFEST)]  # noqa: PTH113


def is_finished(prepared: Prepared, out: Path) -> bool:
    """Whether `out` holds the finished result of `prepared`, whatever is with its further outputs."""
    if prepared.job.overwrite or not prepared.job.resume:
        return False
    return not is_owned(out) and _has_same_output(prepared, out)


def _has_same_output(prepared: Prepared, out: Path) -> bool:
    """Whether `out` holds the finished result of this very job, the files beside the weights included."""
    path = out / MANIFEST
    if not all((out / name).is_file() for name in prepared.generated):
        return False
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    if not isinstance(found, dict) or found.get("digest") != prepared.plan.digest:
        return False
    if any((out / name).read_bytes() != content for name, content in prepared.written.items()):
        return False
    copies = [(file.path, out / file.name) for file in prepared.copied]
    return all(
        copy.is_file() and Path(source).exists() and filecmp.cmp(source, copy, shallow=False)
        for source, copy in copies
    )
