"""`compare`: several strategies on one base and adapter, and which to take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import Command, Section, group, option
from streamconv.cli.completion import TRAINED_ON, words
from streamconv.cli.evaluation import TEXT
from streamconv.cli.options import (
    ADAPTER_HELP,
    ADAPTER_PLACE,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    BASE,
    BASE_REVISION,
    FOLDER,
    IGNORE_EXTRA,
    MOE_LAYOUT,
    SHOW,
    TOKENIZER,
    adapter_option,
    out_option,
    resources,
)
from streamconv.cli.printing import answer, hand_over, say
from streamconv.cli.progress import progress
from streamconv.cli.signals import stop_on_signals
from streamconv.planning.options import COMPARE_DEFAULTS

if TYPE_CHECKING:
    from streamconv.comparison import Compared
    from streamconv.progress import OnProgress


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if not value or ctx.resilient_parsing:
        return
    from streamconv.comparison.strategies import UNMERGED, known_strategies

    rows = [("name", "of", "options of merge", "")]
    for each in known_strategies():
        options = (each.options or {}).items()
        words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options) or UNMERGED
        rows.append((each.name, each.target, words, "with --calibration" if each.calibrated else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        answer(line.rstrip())
    answer("own: the format that training had the base in, --merge-base or that of the base itself")
    ctx.exit()


_STRATEGIES = group(
    option(
        Section.STRATEGIES,
        "--strategies",
        defaults=COMPARE_DEFAULTS,
        metavar="NAME,...|FILE",
        help="Strategies by name, and .yaml or .json files that say by name which options of merge others have. "
        "Default: all that --list shows.",
    ),
    option(
        Section.STRATEGIES,
        "--list",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_list,
        help="Show the strategies, and do nothing else.",
    ),
    option(
        Section.STRATEGIES,
        "--calibration",
        defaults=COMPARE_DEFAULTS,
        type=FOLDER,
        metavar="FILE|DATASET",
        help="Text for strategies that choose codes by what the layers do with one; without it they are left out.",
    ),
    option(
        Section.STRATEGIES,
        "--calibration-tokens",
        defaults=COMPARE_DEFAULTS,
        metavar="N",
        help="As for `streamconv merge`.",
    ),
    option(
        Section.STRATEGIES,
        "--calibration-sequence-length",
        defaults=COMPARE_DEFAULTS,
        type=int,
        metavar="N",
        help="As for `streamconv merge`.",
    ),
    option(
        Section.STRATEGIES,
        "--calibration-gradient-tokens",
        defaults=COMPARE_DEFAULTS,
        metavar="N",
        help="As for `streamconv merge`.",
    ),
    option(
        Section.STRATEGIES,
        "--merge-base",
        defaults=COMPARE_DEFAULTS,
        metavar="FORMAT",
        shell_complete=words(*TRAINED_ON),
        help="The format that training had the base in, which T starts from; that of a base that is itself quantized.",
    ),
    option(Section.STRATEGIES, "--seed", defaults=COMPARE_DEFAULTS, help="Seed of stochastic rounding."),
)
_JUDGING = group(
    option(
        Section.REFERENCE,
        "--reference",
        defaults=COMPARE_DEFAULTS,
        metavar="T|F",
        help="The unmerged model that all are compared with: T, as trained, or F, the update on the 16-bit base.",
    ),
    option(
        Section.REFERENCE,
        "--greedy-tokens",
        defaults=COMPARE_DEFAULTS,
        metavar="N",
        help="Tokens of greedy continuations that are compared; 0: none. For them the reference is run up to N more "
        "times, once for all strategies.",
    ),
    option(
        Section.REFERENCE,
        "--dtype",
        defaults=COMPARE_DEFAULTS,
        metavar="DTYPE",
        shell_complete=words("float32", "float16", "bfloat16"),
        help="What weights are brought to and all is computed in: float32, bfloat16, float16.",
    ),
    option(
        Section.REFERENCE,
        "--max-bits",
        defaults=COMPARE_DEFAULTS,
        type=float,
        metavar="BITS",
        help="Recommend a model of at most so many bits a weight, all tensors counted. Default: one recommendation for "
        "each width of codes.",
    ),
    option(
        Section.REFERENCE,
        "--speed/--no-speed",
        defaults=COMPARE_DEFAULTS,
        help="Load every model with stock transformers and let it decode, in a process of its own.",
    ),
    option(
        Section.REFERENCE,
        "--speed-tokens",
        defaults=COMPARE_DEFAULTS,
        metavar="N",
        help="Tokens that it decodes.",
    ),
)
_PLACE = group(
    option(
        Section.PLACE,
        "--keep",
        defaults=COMPARE_DEFAULTS,
        is_flag=True,
        help="Keep the models, in DIR/models/NAME, instead of removing each once it is judged.",
    ),
    option(
        Section.PLACE,
        "--overwrite",
        defaults=COMPARE_DEFAULTS,
        is_flag=True,
        help="Start anew, whatever comparison the folder holds.",
    ),
)


@click.command("compare", cls=Command)
@group(
    BASE,
    BASE_REVISION,
    adapter_option(required=True, help=f"{ADAPTER_HELP}."),
    ADAPTER_PLACE,
    out_option(required=True, help="Folder for table, JSON and page."),
    TEXT,
    _STRATEGIES,
    _JUDGING,
    TOKENIZER,
    MOE_LAYOUT,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    IGNORE_EXTRA,
    resources(COMPARE_DEFAULTS),
    _PLACE,
    SHOW,
)
def compare_command(as_json: bool, quiet: bool, **given: Any) -> None:
    """Try several ways to merge an adapter, judge each on a text, and recommend one.

    \b
    streamconv compare --base ./llama --adapter ./my-qlora --data valid.txt -o ./compared
    streamconv compare --base ./llama --adapter ./my-qlora --data valid.txt --calibration train.txt -o ./compared
    streamconv compare --base ./llama --adapter ./my-qlora --data valid.txt --max-bits 6 -o ./compared
    """
    from streamconv.comparison import build_options, run_options

    options = build_options(**given)
    with stop_on_signals() as stop, _stages(quiet) as (on_step, on_progress):
        found = run_options(options, on_step, on_progress, stop)
    if as_json:
        hand_over(*json.dumps(found.as_json(), indent=1).splitlines())
    elif not quiet:
        _show(found)
    if found.exit_code:
        failed = [row.name for row in found.rows if row.failure is not None]
        say(f"{len(failed)} of {len(found.rows)} strategies failed: {', '.join(failed)}", err=True)
        raise SystemExit(found.exit_code)


@contextmanager
def _stages(quiet: bool) -> Iterator[tuple[Callable[[str], None], OnProgress]]:
    """Callbacks for the beginning of a stage and for its progress: a bar of its own for each."""
    with ExitStack() as stack:
        shown: list[OnProgress] = []

        def enter(title: str) -> None:
            stack.close()
            if not quiet:
                say(title, err=True)
            shown[:] = [stack.enter_context(progress(title, quiet))]

        def tell(done: int, total: int) -> None:
            for on_progress in shown:
                on_progress(done, total)

        yield enter, tell


def _show(found: Compared) -> None:
    from streamconv.comparison.wording import advice_lines, machine_line, text_line, text_table

    say(*text_table(found).split("\n"))
    say("")
    for sentence in advice_lines(found):
        say(f"* {sentence}")
    for advice in found.advice:
        if advice.name is not None:
            say(f"  {found.row(advice.name).command}")
    say(f"{text_line(found)}; {machine_line(found)}")
    say(f"{found.out}/comparison.html shows it, {found.out}/comparison.json has every number")
