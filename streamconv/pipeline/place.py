"""Where a job's result goes: whether it may, and whether it is there already."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.journal import is_owned, is_publishing
from streamconv.output import check_place
from streamconv.pipeline.preparation import Prepared
from streamconv.report.result import MANIFEST


def check_out(prepared: Prepared, out: Path) -> None:
    """Raise OutputError if the job may not write to `out`: it overlaps an input, or holds something else."""
    inputs = {"base": Path(prepared.job.base).expanduser().resolve()}
    if prepared.job.adapter is not None:
        inputs["adapter"] = Path(prepared.job.adapter).expanduser().resolve()
    try:
        is_ours = is_publishing(out) or _has_same_output(prepared, out)
        check_place(out, inputs, prepared.job.overwrite, is_ours)
    except OSError as error:  # no permission to look, a name too long
        raise OutputError(f"{out} cannot be used: {error.strerror}; choose another --out") from error


def is_finished(prepared: Prepared, out: Path) -> bool:
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
    copies = [(file.path, out / file.name) for file in prepared.copied]
    return all(
        copy.is_file() and Path(source).exists() and filecmp.cmp(source, copy, shallow=False)
        for source, copy in copies
    )
