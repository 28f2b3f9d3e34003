"""Uploads as commands share them: the target, checked before the work, and the upload itself."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.strict_json import some
from streamconv.cli.printing import say
from streamconv.cli.progress import progress
from streamconv.cli.signals import leave, on_signals
from streamconv.errors import HubError, OptionError, OutputError, ResourceError
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.storage.upload import Pushed, Target

MOST_NAMED = 20
"""Files that a line names before it says how many more there are."""

PUSHING = ("push_to", "private", "create_pr", "commit_message", "push_revision")
"""Names of the options that say how and where to push."""


def push_target(given: Mapping[str, Any]) -> Target | None:
    """Target of a push, as the options say; None if there is nothing to push."""
    from streamconv.storage.upload import parse_target

    repo, *extras = (given[name] for name in PUSHING)
    if repo is not None:
        return parse_target(repo, *extras)
    if any(extra not in (None, False) for extra in extras) or given["private"] is False:
        raise OptionError(
            "--private, --public, --create-pr, --commit-message and --push-revision say how to push; add --push-to"
            " REPO, or leave them out"
        )
    return None


def check_before(target: Target) -> None:
    """Refuse before the work what would be refused after it."""
    from streamconv.output.manifest import MANIFEST
    from streamconv.storage.upload import check_target

    check_target(target, MANIFEST)


def hush_hub() -> None:
    """huggingface_hub tells of its retries on stderr, which is good to know, but not where quiet was asked for."""
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(hub_logging.ERROR)


def push_verified(out: str, target: Target, quiet: bool) -> Pushed:
    from streamconv.pipeline import push_output

    draws = not quiet and sys.stderr.isatty()  # huggingface_hub's own bars know of every byte
    with (
        on_signals(leave),
        progress("verify", quiet) as on_progress,
        progress("upload", quiet or draws) as on_upload,
    ):
        return push_output(out, target, draws, on_progress, on_upload)


def push_made(out: str, target: Target, quiet: bool) -> Pushed:
    """Push an output that was made just now; where that fails, say that the output is there, and how to push it."""
    try:
        return push_verified(out, target, quiet)
    except (HubError, OutputError, ResourceError) as error:
        raise type(error)(
            f"{error}. The output in {out} is complete; to push it, run `{_push_command(out, target)}`"
        ) from error


def _push_command(out: str, target: Target) -> str:
    words = ["streamconv", "push", out, target.repo]
    words += {None: [], True: ["--private"], False: ["--public"]}[target.private]
    words += ["--create-pr"] if target.create_pr else []
    words += ["--commit-message", target.commit_message] if target.commit_message else []
    words += ["--revision", target.revision] if target.revision else []
    return shlex.join(words)


def show_pushed(pushed: Pushed) -> None:
    seen = "private" if pushed.private else "public"
    sent = f"{format_size(pushed.bytes)} uploaded" if pushed.bytes else "was complete already"
    where = pushed.pull_request or pushed.url
    say(f"{where}: {pushed.files} files as on disk, {sent}, {seen}, commit {pushed.commit}")
    if pushed.edited:
        say(f"{where}: changed since it was written, as people may: {some(pushed.edited, MOST_NAMED)}")
    if pushed.others:
        say(f"{where}: not of this output, and uploaded with it: {some(pushed.others, MOST_NAMED)}")
