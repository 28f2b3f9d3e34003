"""Places of a job's results: whether these may go there, and whether they are there already."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping
from pathlib import Path

from streamconv.checkpoint.own_files import kind_at
from streamconv.checkpoint.strict_json import parse_object
from streamconv.errors import CheckpointError, OutputError, StreamconvError
from streamconv.output.journal import WORK_FOLDER, is_owned, is_publishing
from streamconv.output.manifest import MANIFEST
from streamconv.output.place import OUTPUT_FOLDERS, check_apart, check_place, check_reachable
from streamconv.output.work_folder import check_entries
from streamconv.pipeline.preparation import Prepared
from streamconv.storage.local import FILE, FOLDER
from streamconv.system_errors import lacking

_MAX_MANIFEST_BYTES = 64 * 2**20


def check_out(prepared: Prepared, out: Path) -> None:
    """Raise OutputError if the job may not write to `out` or to the folder of a further output.

    Such a one overlaps an input or another output, or holds something else.
    """
    places = prepared.places(out)
    for each, folder in places:
        check_folder(each, folder)
    try:
        check_apart(out, [folder for _, folder in places[1:]])
    except OSError as error:
        raise _unusable(out, error) from error


def check_folder(prepared: Prepared, out: Path) -> None:
    """Raise OutputError if the one output `prepared` may not be written to `out`."""
    try:
        check_reachable(out)
        is_same = _has_same_output(prepared, out)
        check_place(out, _inputs(prepared), prepared.job.overwrite, is_same or is_publishing(out))
        if not is_same:
            check_entries(out / WORK_FOLDER)
            _check_names(prepared, out)
    except OSError as error:  # no permission to look, a name too long
        raise _unusable(out, error) from error


def _inputs(prepared: Prepared) -> Mapping[str, Path]:
    inputs = {"base": Path(prepared.job.base).expanduser().resolve()}
    for number, adapter in enumerate(prepared.job.adapters):
        inputs["adapter" if not number else f"adapter {number + 1}"] = Path(adapter).expanduser().resolve()
    if prepared.job.gguf_donor is not None:
        inputs["GGUF donor"] = Path(prepared.job.gguf_donor).expanduser().resolve()
    return inputs


def _check_names(prepared: Prepared, out: Path) -> None:
    """Raise OutputError where a folder has the name of a file to come, or a file that of a folder to come."""
    copied = (file.name for file in prepared.copied)
    for name in (*prepared.generated, *copied, *(shard.name for shard in prepared.plan.shards)):
        folder, _, _ = name.rpartition("/")
        for part, wrong in ((name, FOLDER), (folder, FILE)):
            if part and kind_at(out / part) == wrong:
                raise OutputError(
                    f"{out / part} is {wrong}, where the output will have {FILE if wrong == FOLDER else FOLDER} of that"
                    " name; move it away, or choose another --out"
                )


def _unusable(out: Path, error: OSError) -> StreamconvError:
    return lacking(error) or OutputError(f"{out} cannot be used: {error.strerror}; choose another --out")


def unfinished(prepared: Prepared, out: Path) -> list[tuple[Prepared, Path]]:
    """The outputs that are not there yet, with their folders."""
    return [(each, folder) for each, folder in prepared.places(out) if not is_finished(each, folder)]


def further_outputs(out: Path) -> list[Path]:
    """Folders of finished further outputs in `out`."""
    # Unlike that of Path, this does not fail where nothing may be looked at.
    return [folder for name in OUTPUT_FOLDERS if os.path.isfile((folder := out / name) / MANIFEST)]  # noqa: PTH113  see above


def is_finished(prepared: Prepared, out: Path) -> bool:
    """Whether `out` holds the finished result of `prepared`, whatever is with its further outputs.

    With `--overwrite` it is made again, but for a part: a worker that is started once more finds what all have made.
    """
    if (prepared.job.overwrite and prepared.job.part is None) or not prepared.job.resume:
        return False
    try:
        return not is_owned(out) and _has_same_output(prepared, out)
    except OSError as error:
        raise _unusable(out, error) from error


def _has_same_output(prepared: Prepared, out: Path) -> bool:
    """Whether `out` holds the finished result of this very job, the files beside the weights included."""
    if not all((out / name).is_file() for name in prepared.generated):
        return False
    if _digest_in(out / MANIFEST) != prepared.plan.digest:
        return False
    if any(_read(out / name, len(content)) != content for name, content in prepared.written.items()):
        return False
    copies = [(file.path, out / file.name) for file in prepared.copied]
    return all(
        copy.is_file() and Path(source).exists() and filecmp.cmp(source, copy, shallow=False)
        for source, copy in copies
    )


def _digest_in(manifest: Path) -> object:
    """The digest of the plan that a manifest is of; None where that is none of ours."""
    content = _read(manifest, _MAX_MANIFEST_BYTES)
    try:
        return None if content is None else parse_object(content, str(manifest)).get("digest")
    except CheckpointError:
        return None


def _read(path: Path, most: int) -> bytes | None:
    """Content of a file; None of one that is longer."""
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    return content if len(content) <= most else None
