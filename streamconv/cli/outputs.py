"""`verify` and `push`: what is done with a finished output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from streamconv.checkpoint.strict_json import some
from streamconv.cli.blocks import Command, Section, group, option
from streamconv.cli.options import (
    ADAPTER_PLACE,
    ALLOW_PICKLE,
    BASE_REVISION,
    FOLDER,
    SHOW,
    adapters_option,
    base_option,
    push_options,
)
from streamconv.cli.printing import hand_over, say
from streamconv.cli.progress import progress
from streamconv.cli.signals import interrupt_on_signals
from streamconv.cli.uploads import MOST_NAMED, hush_hub, push_verified, show_pushed
from streamconv.planning.options import MERGE_DEFAULTS
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.output.verifier import Verified


@click.command("verify", cls=Command)
@click.argument("out", type=FOLDER)
@group(
    option(
        Section.INPUTS,
        "--full",
        is_flag=True,
        help="Compute the result again from --base and --adapter, and compare.",
    ),
    base_option(allow_from_autoenv=False, help="The base it was made from; for --full."),
    BASE_REVISION,
    adapters_option(
        allow_from_autoenv=False,
        help="The adapter it was made from; for --full. Repeatable, in the order of then; weights are recorded.",
    ),
    ADAPTER_PLACE,
    option(
        Section.INPUTS,
        "--calibration",
        type=FOLDER,
        metavar="FILE|DATASET",
        help="The text it was calibrated with; for --full. Without it, what the text decided is decoded and compared "
        "with base and adapter.",
    ),
    ALLOW_PICKLE,
    option(
        Section.RESOURCES,
        "--device",
        defaults=MERGE_DEFAULTS,
        help="auto, cpu, cuda or cuda:N; for --full.",
    ),
    SHOW,
)
def verify_command(out: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Recheck a finished output against its streamconv.json: sizes, hashes, layout.

    Every file of it is checked. Cards, licences, chat templates and settings of generation, tokenizer and processors
    may be edited: that is told, and no error.
    """
    from dataclasses import asdict

    from streamconv.pipeline import further_outputs, output_folder, verify

    with interrupt_on_signals(), progress("verify", quiet) as on_progress:
        checked = verify(out, on_progress=on_progress, **given)
    if as_json:
        hand_over(*json.dumps(asdict(checked)).splitlines())
    elif not quiet:
        how = "computed again, equal byte for byte" if checked.exact else "sizes, hashes and layout are right"
        if checked.calibrated:
            how = (
                f"computed again, equal byte for byte, but for {checked.calibrated} calibrated weights: they come near "
                "their targets and keep as much of the update as is stated (--calibration compares their bytes)"
            )
        say(
            f"{out}: {checked.tensors} tensors in {_shards(checked.shards)}, {format_size(checked.bytes)}: {how}"
        )
        for line in beside_lines(checked):
            say(f"{out}: {line}")
        for folder in further_outputs(output_folder(out)):
            say(f"{folder} is an output of its own and was not looked at")


@click.command("push", cls=Command)
@click.argument("out", type=FOLDER)
@click.argument("repo")
@group(push_options("--revision"), SHOW)
def push_command(out: str, repo: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Verify a finished output and upload it to the Hub.

    \b
    streamconv push ./merged me/merged

    Run again after an interruption, it sends only what the Hub does not have yet.
    """
    from dataclasses import asdict

    from streamconv.storage.upload import parse_target

    target = parse_target(
        repo, given["private"], given["create_pr"], given["commit_message"], given["push_revision"]
    )
    if quiet:
        hush_hub()
    pushed = push_verified(out, target, quiet)
    if as_json:
        hand_over(*json.dumps(asdict(pushed), indent=1).splitlines())
    elif not quiet:
        show_pushed(pushed)


def beside_lines(checked: Verified) -> Iterator[str]:
    """Lines on files of an output that are not as they were written, and on files beside it."""
    for done, names in (("changed", checked.edited), ("removed", checked.removed), ("added", checked.added)):
        if names:
            yield f"{done} since it was written, as people may: {some(names, MOST_NAMED)}"
    if checked.others:
        yield f"not of this output, and not looked at: {some(checked.others, MOST_NAMED)}"


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
