"""`push()`: a finished output, verified, to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from streamconv.errors import InputError
from streamconv.output.manifest import MANIFEST
from streamconv.output.publish import is_of_model
from streamconv.output.sidecars import RESIDUAL
from streamconv.output.tokenizer_files import CHAT_TEMPLATES
from streamconv.output.verifier import hash_file, read_manifest
from streamconv.pipeline.job import output_folder
from streamconv.pipeline.verification import refuse_written, verify
from streamconv.planning.options import Folder
from streamconv.progress import OnProgress, quiet
from streamconv.storage.local import open_folder
from streamconv.storage.upload import LocalFile, Pushed, Target, check_target, parse_target, upload
from streamconv.system_errors import translated


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
    remote = check_target(target, MANIFEST)
    checked = verify(folder, on_progress=on_progress)
    listed = {name: entry["sha256"] for key in ("shards", "files") for name, entry in manifest[key].items()}
    message = f"Upload {manifest['quant']} model made with streamconv {manifest['streamconv']}"
    files = _files_to_push(folder, listed)
    message = message.replace("none ", "16-bit ")
    pushed = upload(target, remote, files, is_of_model, message, show_progress, on_upload)
    return replace(pushed, edited=checked.edited)


def _files_to_push(folder: Path, listed: Mapping[str, str]) -> dict[str, LocalFile]:
    """All files of an output but hidden ones; `listed` are those with a known SHA-256.

    Of folders only those of chat templates and of a residual adapter are ours.
    """
    files = {}
    storage = open_folder(str(folder))
    inside = [name for name in storage.names(RESIDUAL) if name in listed]
    inside += storage.names(CHAT_TEMPLATES)
    ours = [storage.file(name).name for name in inside]  # no links to elsewhere
    for path in (*sorted(folder.iterdir()), *(folder / name for name in ours)):
        name = str(path.relative_to(folder))
        if path.name.startswith(".") or not path.is_file():
            continue
        if name.endswith(".safetensors") and name not in listed:
            raise InputError(f"{path} is not of this output; move it elsewhere before you push")
        sha256 = listed.get(name) or hash_file(str(path), lambda _: None)
        files[name] = LocalFile(path, path.stat().st_size, sha256)
    return files
