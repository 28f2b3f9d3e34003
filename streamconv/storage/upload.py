"""An output folder onto the Hub: checked before, sent in one commit, compared after.

The contents of large files are sent first (`HfApi.preupload_lfs_files`), which the Hub keeps and need not be sent
again, and then one commit is made of them: a revision never shows half a model, and an interrupted upload goes on when
it is asked for again. `upload_folder` of huggingface_hub 2.4 is not used, because where it runs longer than some
minutes it commits what it has by then (`_upload_pipeline.py`, MAX_COMMIT_INTERVAL).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from tqdm import tqdm

from streamconv.errors import HubError, OptionError, OutputError, VerificationError
from streamconv.sizes import format_size
from streamconv.storage.blobs import GIT, HubFile, content_id
from streamconv.storage.hub_errors import endpoint, hub_errors, without_token
from streamconv.storage.listing import list_commit
from streamconv.storage.local import is_inside, reading

_SENT_AT_ONCE = 5  # create_commit's own number
_MODEL_FILES = ("config.json", "adapter_config.json")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Target of an upload: a repository and how. `private` None: as it is, and private if it is made now."""

    repo: str
    private: bool | None = None
    create_pr: bool = False
    commit_message: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to upload: its size in bytes and their SHA-256; `content` is set where what was hashed is in memory."""

    path: Path
    size: int
    sha256: str
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Pushed:
    """Result of an upload: `commit` holds the output's files, `bytes` of them were not there before.

    `pull_request` is the page of the pull request that proposes the commit, None where it is on the branch. `edited`
    are files that people may edit, and that are not as they were written; `others` were in the folder without being of
    the output, and were uploaded with it.
    """

    repo: str
    url: str
    commit: str
    private: bool
    pull_request: str | None
    files: int
    bytes: int
    edited: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository as it is: whether it exists, who sees it, and the files of the revision to push to."""

    exists: bool
    private: bool
    has_revision: bool
    commit: str | None
    files: Mapping[str, HubFile]


def parse_target(
    repo: str, private: bool | None, create_pr: bool, commit_message: str | None, revision: str | None
) -> Target:
    """The target, its parts checked by their text. Raises OptionError."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"{repo!r} is not the id of a repository, expected org/name; {error}") from error
    if "/" not in repo:
        raise OptionError(f"{repo!r} does not say whose repository it is; write YOUR-NAME/{repo}")
    if revision is not None and not is_inside(revision):
        raise OptionError(f"{revision!r} is not a revision to push to; give the name of a branch")
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise OptionError(
            f"--create-pr proposes a change of the main branch, and --revision {revision} names another; leave one out"
        )
    return Target(repo, private, create_pr, commit_message, revision)


def check_target(target: Target, manifest_name: str) -> Remote:
    """The target as it is now. Raises HubError or OutputError if a push to it could not succeed.

    Changes nothing, so it is asked before hours of merging, too. Another model's files are not written over unless
    `manifest_name` shows them to be an output of ours, or a pull request leaves the decision to people.
    """
    if get_token() is None:
        raise HubError(f"{target.repo}: to push, log in with `hf auth login`, or set HF_TOKEN")
    remote = _look(target)
    with hub_errors(target.repo, target.revision):
        role = (HfApi().whoami().get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            f"{target.repo}: the token in use may only read; make one that may write at"
            f" {endpoint()}/settings/tokens and log in with `hf auth login`"
        )
    if remote.exists and target.private is not None and remote.private is not target.private:
        found, wanted = ("private", "--public") if remote.private else ("public", "--private")
        raise OutputError(
            f"{target.repo} exists and is {found}, and {wanted} was given; change it at"
            f" {endpoint()}/{target.repo}/settings, or leave {wanted} out"
        )
    _check_model(target, remote, manifest_name)
    return remote


def _check_model(target: Target, remote: Remote, manifest_name: str) -> None:
    """Raise OutputError if another model's files would be written over."""
    others = [
        name for name in remote.files if name in _MODEL_FILES or name.endswith((".safetensors", ".gguf"))
    ]
    if others and manifest_name not in remote.files and not target.create_pr:
        raise OutputError(
            f"{target.repo} holds another model ({', '.join(sorted(others)[:3])}), which would be written over; push"
            " to a new repository, or add --create-pr to propose the change"
        )


def upload(
    target: Target,
    remote: Remote,
    files: Mapping[str, LocalFile],
    is_stale: Callable[[str], bool],
    manifest_name: str,
    message: str,
    show_progress: bool,
    on_progress: Callable[[int, int], None],
    check: Callable[[], None] = lambda: None,
) -> Pushed:
    """Bring `files` to the target in one commit, and compare what the Hub then lists with them.

    Remote files that `is_stale` are removed in the same commit. `on_progress` is told of bytes sent, and of all that
    are to be, after every few large files. `check` is called when all contents are sent, before the commit, and may
    raise. The commit is made only on top of what was compared: should another have been made meanwhile, it is refused.
    Raises HubError, VerificationError.
    """
    repo = target.repo
    changed = {name: file for name, file in files.items() if not _is_same(remote.files.get(name), file)}
    stale = sorted(name for name in remote.files if name not in files and is_stale(name))
    with hub_errors(repo, target.revision), _bars(show_progress):
        commit, pull_request = remote.commit, None
        if changed or stale or commit is None:
            remote = _make_place(target, remote, manifest_name)
            _log.info("uploading %d files to %s", len(changed), repo)
            additions = [
                CommitOperationAdd(name, file.content or str(file.path))
                for name, file in sorted(changed.items())
            ]
            _send(target, additions, changed, on_progress)
            check()
            info = HfApi().create_commit(
                repo,
                [*additions, *(CommitOperationDelete(name) for name in stale)],
                commit_message=target.commit_message or message,
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=None if target.create_pr else remote.commit,
            )
            commit, pull_request = info.oid, info.pr_url and without_token(info.pr_url)
        _, listed, found = list_commit(repo, commit)
    _compare(repo, listed, files)
    return Pushed(
        repo=repo,
        url=f"{endpoint()}/{repo}",
        commit=commit,
        private=bool(found.private),
        pull_request=pull_request,
        files=len(files),
        bytes=sum(file.size for file in changed.values()),
    )


def _send(
    target: Target,
    additions: Sequence[CommitOperationAdd],
    files: Mapping[str, LocalFile],
    on_progress: Callable[[int, int], None],
) -> None:
    """Send the contents of large files, so many at a time as the commit would; small ones go with the commit."""
    done, total = 0, sum(file.size for file in files.values())
    on_progress(done, total)
    for first in range(0, len(additions), _SENT_AT_ONCE):
        some = additions[first : first + _SENT_AT_ONCE]
        HfApi().preupload_lfs_files(
            target.repo,
            some,
            revision=target.revision,
            create_pr=target.create_pr,
            num_threads=_SENT_AT_ONCE,
            free_memory=False,
        )
        done += sum(files[addition.path_in_repo].size for addition in some)
        on_progress(done, total)


def _look(target: Target) -> Remote:
    """The repository and revision, neither of which need exist yet."""
    try:
        with hub_errors(target.repo, target.revision):
            origin, files, found = list_commit(target.repo, target.revision or constants.DEFAULT_REVISION)
    except HubError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            return _look_at_main(target)
        if _is_missing(error.__cause__):
            return Remote(False, True, False, None, {})
        raise
    return Remote(True, bool(found.private), True, origin.commit, files)


def _look_at_main(target: Target) -> Remote:
    """A branch that is still to be made starts with the files of the main branch."""
    with hub_errors(target.repo):
        _, files, found = list_commit(target.repo, constants.DEFAULT_REVISION)
    return Remote(True, bool(found.private), False, None, files)


def _is_missing(error: BaseException | None) -> bool:
    """Whether the Hub said 404 to a user it knows: of a login it does not accept, 401 says as little."""
    return type(error) is RepositoryNotFoundError and error.response.status_code == 404


def _make_place(target: Target, remote: Remote, manifest_name: str) -> Remote:
    """Make the repository and branch where they are missing; the target as it is then."""
    if remote.exists and remote.has_revision:
        return remote
    if not remote.exists:
        private = target.private is not False
        _log.info("creating %s (%s)", target.repo, "private" if private else "public")
        HfApi().create_repo(target.repo, private=private, exist_ok=True)
    if target.revision is not None and not remote.has_revision:
        HfApi().create_branch(target.repo, branch=target.revision, exist_ok=True)
    made = _look(target)
    _check_model(target, made, manifest_name)  # somebody may have made it meanwhile, and filled it
    return made


def _is_same(remote: HubFile | None, file: LocalFile) -> bool:
    """Whether the Hub has the file: it names large ones by SHA-256, small ones by git's id of a blob."""
    if remote is None or remote.size != file.size:
        return False
    if len(remote.blob) == len(GIT):
        with reading(str(file.path.resolve())), file.path.open("rb", buffering=0) as stream:
            return remote.blob == content_id(stream, file.size, GIT)
    return remote.blob == file.sha256


def _compare(repo: str, listed: Mapping[str, HubFile], files: Mapping[str, LocalFile]) -> None:
    """Raise VerificationError unless the Hub lists every file with its size and content."""
    for name, file in files.items():
        found = listed.get(name)
        if not _is_same(found, file):
            was = f"{format_size(found.size)} named {found.blob}" if found else "no such file"
            raise VerificationError(
                f"{repo}: the Hub lists {was} for {name}, expected {file.size} bytes with SHA-256 {file.sha256}; push"
                " again, and do not use that revision"
            )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show the library's own progress bars or not; a user who has switched them off is obeyed.

    None of them starts tqdm's thread that looks after slow bars: Python waits for ever for one that gets no memory.
    """
    is_hidden_by_us = not shown and not are_progress_bars_disabled()
    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
    if is_hidden_by_us:
        disable_progress_bars()
    try:
        yield
    finally:
        tqdm.monitor_interval = interval
        if is_hidden_by_us:
            enable_progress_bars()
