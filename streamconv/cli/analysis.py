"""`analyze`: what merging an adapter will do to each weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import Command, Section, group, option
from streamconv.cli.completion import TRAINED_ON, has_codes, words
from streamconv.cli.options import (
    ADAPTER_HELP,
    ADAPTER_PLACE,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    BASE,
    BASE_REVISION,
    IGNORE_EXTRA,
    MOE_LAYOUT,
    RESOURCES,
    SHOW,
    adapter_option,
)
from streamconv.cli.printing import answer
from streamconv.cli.progress import progress
from streamconv.cli.signals import interrupt_on_signals
from streamconv.planning.options import ANALYZE_DEFAULTS
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.analysis import Analysis, OnGrid, TargetAnalysis


class _Numbers(click.ParamType[tuple[int, ...]]):
    """`0,10,20`."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0,10,20", param, ctx)


@click.command("analyze", cls=Command)
@group(
    BASE,
    BASE_REVISION,
    adapter_option(required=True, help=f"{ADAPTER_HELP}."),
    ADAPTER_PLACE,
    option(
        Section.RESULT,
        "--format",
        "formats",
        defaults=ANALYZE_DEFAULTS,
        multiple=True,
        metavar="FORMAT",
        shell_complete=words(rows=has_codes),
        help="A format with codes, as in --quant of merge. Repeatable.",
    ),
    option(
        Section.RESULT,
        "--layers",
        defaults=ANALYZE_DEFAULTS,
        type=_Numbers(),
        metavar="NUMBERS",
        help="Only the weights of these layers: 0,10,20. Default: all.",
    ),
    option(
        Section.RESULT,
        "--report",
        defaults=ANALYZE_DEFAULTS,
        type=click.Path(),
        metavar="DIR",
        help="Also draw plots, into this folder; needs streamconv[report].",
    ),
    option(Section.RESULT, "--seed", defaults=ANALYZE_DEFAULTS, help="Seed of stochastic rounding."),
    option(
        Section.MERGE,
        "--merge-base",
        defaults=ANALYZE_DEFAULTS,
        metavar="FORMAT",
        shell_complete=words("auto", "original", *TRAINED_ON),
        help="What target T is an update of: the base rounded to nf4, nf4-dq, fp4, fp4-dq or int8 as in training; "
        "original: leave T out; auto: nf4-dq, or a quantized base as it is.",
    ),
    MOE_LAYOUT,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    IGNORE_EXTRA,
    RESOURCES,
    SHOW,
)
def analyze_command(as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure what merging an adapter does to each weight, and what every way to store it keeps. Writes no weights.

    \b
    streamconv analyze --base ./llama --adapter ./my-qlora
    streamconv analyze --base ./llama --adapter ./my-qlora --layers 0,15,31 --report ./plots
    streamconv analyze --base ./llama --adapter ./my-qlora --format nf4 --json > analysis.json
    """
    from streamconv.analysis import analyze

    with interrupt_on_signals(), progress("analyze", quiet) as on_progress:
        found = analyze(**given, on_progress=on_progress)
    if as_json:
        answer(*json.dumps(found.as_json(), indent=1).splitlines())
    elif not quiet:
        _show(found)


# -- the tables ------------------------------------------------------------------------------------------------------


def _show(found: Analysis) -> None:
    for target, reason in found.targets.items():
        answer(f"{target}: {reason}", "")
        _show_table(
            ("", "weights", "|D|/|B|", "16 bit", "kurtosis", "after", ">6 sigma", "after", "|W-B|/|D|"),
            [(name, f"{count}", *_update(of_kind)) for name, count, of_kind in _kinds(found, target)],
        )
        for name in found.total[target].formats:
            _show_format(found, target, name)
    for sentence in found.advice:
        answer(f"* {sentence}")
    for path in found.plots:
        answer(f"drew {path}")
    answer(
        f"read {format_size(found.bytes_read)} in {found.seconds:.1f} s, "
        f"peak memory {format_size(found.peak_ram_bytes)}"
    )


def _kinds(found: Analysis, target: str) -> Iterator[tuple[str, int, TargetAnalysis]]:
    """Each kind of weight with their number and what was found of them, and all of them together."""
    for kind, targets in found.kinds.items():
        if target in targets:
            yield kind, sum(weight.kind == kind for weight in found.weights), targets[target]
    yield "all", len(found.weights), found.total[target]


def _update(found: TargetAnalysis) -> Sequence[str]:
    distance = found.base_error_to_delta
    return (
        f"{found.delta_to_base:.4f}",
        f"{found.dense.kept:.2%}",
        f"{found.kurtosis_before:.3f}",
        f"{found.kurtosis_after:.3f}",
        f"{found.outliers_before}",
        f"{found.outliers_after}",
        "-" if distance is None else f"{distance:.2f}",
    )


def _show_format(found: Analysis, target: str, name: str) -> None:
    """Show the share of the update that each rounding keeps, with the least and the most of any weight."""
    head = [f"{name} of {target}", "|D|/step", "predicted", "block max"]
    for rounding in found.total[target].formats[name].roundings:
        head += [rounding, "weights", "changed", "|Q-T|/|D|"]
    rows = []
    for kind, _, of_kind in _kinds(found, target):
        if name in of_kind.formats:
            weights = [
                weight.targets[target].formats[name]
                for weight in found.weights
                if kind in ("all", weight.kind) and name in weight.targets[target].formats
            ]
            rows.append((kind, *_on_grid(of_kind.formats[name], weights)))
    _show_table(head, rows)


def _on_grid(found: OnGrid, weights: Sequence[OnGrid]) -> Iterator[str]:
    yield f"{found.delta_to_step:.4f}"
    yield "-" if found.predicted_kept is None else f"{found.predicted_kept:.1%}"
    yield f"{found.block_maximum_change:.2%}"
    for name, stored in found.roundings.items():
        kept = [each.roundings[name].kept for each in weights]
        yield from (f"{stored.kept:.1%}", f"{min(kept):.0%}..{max(kept):.0%}")
        yield from (f"{stored.changed:.1%}", f"{stored.error:.2f}")


def _show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        answer("  ".join((row[0].ljust(widths[0]), *numbers)))
    answer("")
