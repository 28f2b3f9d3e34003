"""`push()`: a finished output, verified, to the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.checkpoint.container import GGUF_SUFFIX, is_gguf_output
from streamconv.errors import InputError
from streamconv.output.manifest import MANIFEST, SIDECARS
from streamconv.output.publish import is_of_model
from streamconv.output.sidecars import RESIDUAL
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.output.verifier import read_manifest
from streamconv.pipeline.job import output_folder
from streamconv.pipeline.verification import refuse_written, verify
from streamconv.planning.options import Folder
from streamconv.progress import OnProgress, quiet
from streamconv.storage.blobs import SHA256, content_id
from streamconv.storage.held import HeldFile, hold
from streamconv.storage.local import list_folder, open_folder, reading
from streamconv.storage.upload import LocalFile, Pushed, Target, check_target, parse_target, upload
from streamconv.system_errors import translated

_IN_MEMORY_BYTES = 10 * 2**20
"""Size up to which the Hub may take a file into the commit itself, where no hash of ours goes with it."""


def push(
    out: Folder,
    repo: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
    on_progress: OnProgress = quiet,
    on_upload: OnProgress = quiet,
) -> Pushed:
    """Verify a finished output, upload it to the Hub in one commit, and compare what the Hub then lists.

    A repository that does not exist is made, private unless `private` is False. `on_progress` is told of the
    verification, `on_upload` of the upload, `show_progress` lets huggingface_hub draw its bars. Called again after an
    interruption, it does not send again what the Hub has. Raises HubError, OutputError where `repo` holds another
    model, VerificationError.
    """
    target = parse_target(repo, private, create_pr, commit_message, revision)
    return push_output(out, target, show_progress, on_progress, on_upload)


@translated()
def push_output(
    out: Folder, target: Target, show_progress: bool, on_progress: OnProgress, on_upload: OnProgress
) -> Pushed:
    """Push as `push` does, with the target parsed."""
    folder = output_folder(out)
    refuse_written(folder)
    manifest = read_manifest(open_folder(str(folder)), MANIFEST)
    listed = {name: entry["sha256"] for key in ("shards", "files") for name, entry in manifest[key].items()}
    with hold(folder, _names_to_push(folder, listed)) as held:
        remote = check_target(target, MANIFEST)
        checked = verify(folder, on_progress=on_progress)
        for each in held.values():
            each.check(by_name=True)
        files = {name: _local_file(name, each, listed) for name, each in held.items()}
        message = f"Upload {manifest['quant']} model made with streamconv {manifest['streamconv']}"
        message = message.replace("none ", "16-bit ")

        def check() -> None:
            for each in held.values():
                each.check()

        pushed = upload(
            target, remote, files, is_of_model, MANIFEST, message, show_progress, on_upload, check
        )
        return replace(pushed, edited=checked.edited, others=_others(manifest, files))


def _others(manifest: Mapping[str, Any], pushed: Collection[str]) -> tuple[str, ...]:
    """Files that the manifest does not list; none where it is of the first version, which lists only some."""
    if manifest["manifest_version"] == 1:
        return ()
    known = {MANIFEST, *(name for key in ("shards", "files", SIDECARS) for name in manifest[key])}
    return tuple(sorted({*pushed} - known))


def _names_to_push(folder: Path, listed: Collection[str]) -> list[str]:
    """All files of an output but hidden ones; `listed` are those that its manifest has.

    Of folders only those of chat templates and of a residual adapter are ours; a link to a folder is none of ours.
    """
    storage = open_folder(str(folder))
    names = [path.name for path in list_folder(folder) if not path.name.startswith(".") and not path.is_dir()]
    names += [name for name in storage.names(RESIDUAL) if name in listed]
    names += [name for name in storage.names(CHAT_TEMPLATES) if not name.rpartition("/")[2].startswith(".")]
    for name in names:
        if (name.endswith(".safetensors") or is_gguf_output(name)) and name not in listed:
            raise InputError(f"{folder / name} is not of this output; move it elsewhere before you push")
    return sorted(names)


def _local_file(name: str, file: HeldFile, listed: Mapping[str, str]) -> LocalFile:
    """A file as it is sent. Small ones, which no hash in the commit protects, are read once, and those bytes sent."""
    if file.size > _IN_MEMORY_BYTES:
        return LocalFile(file.path, file.size, _sha256(name, file, listed))
    with (
        reading(str(file.real)),
        open(file.descriptor, "rb", buffering=0, closefd=False) as stream,
    ):
        stream.seek(0)
        content = stream.read(file.size + 1)
    if len(content) != file.size:
        raise InputError(f"{file.real} changed while it was pushed; push again once nothing writes to it")
    sha256 = hashlib.sha256(content).hexdigest()
    if listed.get(name, sha256) != sha256:
        raise InputError(f"{file.real} changed since it was verified; push again once nothing writes to it")
    return LocalFile(file.path, file.size, sha256, content)


def _sha256(name: str, file: HeldFile, listed: Mapping[str, str]) -> str:
    """SHA-256 of a file: of weights, as they were verified; of others, which people may edit, as they are."""
    if name.endswith((".safetensors", GGUF_SUFFIX)) and name in listed:
        return listed[name]
    with (
        reading(str(file.real)),
        open(file.descriptor, "rb", buffering=0, closefd=False) as stream,
    ):
        return content_id(stream, file.size, SHA256)
