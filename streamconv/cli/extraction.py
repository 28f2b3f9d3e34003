"""`extract`: a low-rank adapter from two checkpoints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import Command, Section, group, option
from streamconv.cli.completion import words
from streamconv.cli.options import BASE, BASE_REVISION, FOLDER, OUT, SHOW
from streamconv.cli.printing import hand_over, say
from streamconv.cli.progress import progress
from streamconv.cli.signals import stop_on_signals
from streamconv.planning.options import EXTRACT_DEFAULTS
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.extraction import Extraction

_WORST = 5


@click.command("extract", cls=Command)
@group(
    BASE,
    BASE_REVISION,
    option(
        Section.INPUTS,
        "--finetuned",
        type=FOLDER,
        required=True,
        metavar="MODEL",
        help="What fine-tuning made of the base: a folder, or a Hub id.",
    ),
    option(
        Section.INPUTS,
        "--finetuned-revision",
        defaults=EXTRACT_DEFAULTS,
        metavar="REV",
        help="Branch, tag or commit of a fine-tuned model from the Hub. Default: main.",
    ),
    OUT,
    option(
        Section.RESULT,
        "--rank",
        defaults=EXTRACT_DEFAULTS,
        metavar="R",
        help="Rank of the factors of every weight; auto: for each the least that --share asks for.",
    ),
    option(
        Section.RESULT,
        "--share",
        defaults=EXTRACT_DEFAULTS,
        type=float,
        metavar="SHARE",
        help="With --rank auto: share of the norm of each weight's difference that the factors must have.",
    ),
    option(
        Section.RESULT,
        "--max-rank",
        defaults=EXTRACT_DEFAULTS,
        type=int,
        metavar="R",
        help="With --rank auto: the highest rank.",
    ),
    option(
        Section.RESULT,
        "--dtype",
        defaults=EXTRACT_DEFAULTS,
        metavar="DTYPE",
        shell_complete=words("float32", "float16", "bfloat16"),
        help="Type that the factors are stored in: float32, float16, bfloat16.",
    ),
    option(
        Section.RESULT, "--seed", defaults=EXTRACT_DEFAULTS, type=int, help="Seed of the random sketches."
    ),
    option(
        Section.RESOURCES,
        "--device",
        defaults=EXTRACT_DEFAULTS,
        metavar="DEVICE",
        help="cpu, cuda, cuda:N, or auto: cuda if there is one.",
    ),
    option(
        Section.RESOURCES,
        "--max-ram",
        defaults=EXTRACT_DEFAULTS,
        metavar="SIZE",
        help="Memory for the difference of one weight, which is read once where it fits in half of it.",
    ),
    option(
        Section.PLACE,
        "--no-resume",
        is_flag=True,
        help="Discard what an interrupted run has left, and begin anew.",
    ),
    SHOW,
)
def extract_command(as_json: bool, quiet: bool, no_resume: bool, **given: Any) -> None:
    """Make a LoRA adapter of the difference between two checkpoints, a weight at a time.

    \b
    streamconv extract --base ./llama --finetuned ./my-model --rank 32 -o ./adapter
    streamconv extract --base ./llama --finetuned ./my-model --rank auto --share 0.9 -o ./adapter
    """
    from streamconv.extraction import extract

    with stop_on_signals() as stop, progress("extract", quiet) as on_progress:
        found = extract(**given, resume=not no_resume, on_progress=on_progress, stop=stop)
    if as_json:
        hand_over(*json.dumps(found.as_json(), indent=1).splitlines())
    elif not quiet:
        _show(found)


def _show(found: Extraction) -> None:
    ranks = sorted(each.rank for each in found.weights.values())
    shown = (
        f"{ranks[0]}" if ranks and ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}" if ranks else "-"
    )
    say(
        f"{found.out}: {format_size(found.bytes_written)} in {found.seconds:.1f} s; {len(ranks)} weights with"
        f" factors of rank {shown}, {len(found.saved)} saved whole, {found.unchanged} the same in both"
    )
    if found.residual is not None:
        say(f"{found.residual:.2%} of the norm of the difference is left out")
    worst = sorted(found.weights.items(), key=lambda pair: -pair[1].residual)[:_WORST]
    for name, each in worst:
        say(f"  {each.residual:.2%} of {name}, rank {each.rank}")
    for note in found.notes:
        say(f"note: {note}")
