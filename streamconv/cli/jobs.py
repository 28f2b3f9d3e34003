"""`merge`, `convert` and `plan`: from options to a run, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import group
from streamconv.cli.launchers import named_part
from streamconv.cli.options import (
    ADAPTER_HELP,
    ADAPTER_PLACE,
    ALLOW_PICKLE,
    BASE,
    BASE_REVISION,
    CONVERTED,
    JSON_PROGRESS,
    OUT,
    PLACE,
    PUSH_TO,
    RESOURCES,
    RESULT,
    SHOW,
    TARGET,
    adapters_option,
    out_option,
)
from streamconv.cli.printing import answer, hand_over, say
from streamconv.cli.progress import JsonLines, progress
from streamconv.cli.recipes import RECIPE, JobCommand
from streamconv.cli.signals import stop_on_signals
from streamconv.cli.uploads import PUSHING, check_before, hush_hub, push_made, push_target, show_pushed
from streamconv.errors import OptionError
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.output.manifest import Report
    from streamconv.pipeline import Job, Prepared


@click.command("merge", cls=JobCommand)
@group(
    BASE,
    BASE_REVISION,
    adapters_option(required=True, help=f"{ADAPTER_HELP}. Repeatable, each with a --weight after it."),
    ADAPTER_PLACE,
    OUT,
    RESULT,
    TARGET,
    RESOURCES,
    PLACE,
    PUSH_TO,
    RECIPE,
    SHOW,
    JSON_PROGRESS,
)
def merge_command(
    out: str, dry_run: bool, as_json: bool, quiet: bool, json_progress: bool, **given: Any
) -> None:
    """Merge an adapter into a base model.

    \b
    streamconv merge --base ./llama --adapter ./my-lora -o ./merged
    streamconv merge --base ./llama --adapter ./my-qlora --merge-base nf4-dq --quant nf4-dq -o ./merged-4bit
    streamconv merge --base ./llama --adapter ./sft --weight 0.7 --adapter ./dpo --weight 0.3 -o ./merged
    streamconv merge --base org/llama --adapter me/my-lora@v2 --push-to me/merged -o ./merged
    """
    _run_job(given, out, dry_run, as_json, quiet, JsonLines() if json_progress else None)


@click.command("convert", cls=JobCommand)
@group(
    CONVERTED,
    BASE_REVISION,
    ALLOW_PICKLE,
    OUT,
    RESULT,
    RESOURCES,
    PLACE,
    PUSH_TO,
    RECIPE,
    SHOW,
    JSON_PROGRESS,
)
def convert_command(
    out: str, dry_run: bool, as_json: bool, quiet: bool, json_progress: bool, **given: Any
) -> None:
    """Quantize, dequantize or reshard a model, without an adapter.

    \b
    streamconv convert --base ./llama --quant nf4-dq -o ./llama-4bit
    streamconv convert --base ./llama-4bit --quant none -o ./llama-16bit
    """
    _run_job(given, out, dry_run, as_json, quiet, JsonLines() if json_progress else None)


@click.command("plan", cls=JobCommand)
@group(
    BASE,
    BASE_REVISION,
    adapters_option(help=f"{ADAPTER_HELP}; without it: as `convert`. Repeatable."),
    ADAPTER_PLACE,
    out_option(help="Folder the result would go to: checked, not touched."),
    RESULT,
    TARGET,
    RESOURCES,
    PLACE,
    PUSH_TO,
    RECIPE,
    SHOW,
)
def plan_command(out: str | None, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show what merge or convert would do, without writing: files, sizes, memory, matched modules, choices."""
    del dry_run
    from streamconv.pipeline import prepare

    push_target(given)
    _show_plan(prepare(_job(given)), out, as_json, quiet)


def _run_job(
    given: Mapping[str, Any], out: str, dry_run: bool, as_json: bool, quiet: bool, lines: JsonLines | None
) -> None:
    from dataclasses import asdict

    from streamconv.pipeline import output_folder, prepare

    if quiet:
        hush_hub()
    folder = output_folder(out)
    target = push_target(given)
    if target is not None:
        _refuse_part(given)
        check_before(target)
    if lines is not None:
        lines.begin("plan")
    # Nothing is written yet that a signal could leave half done: it just ends the process.
    prepared = prepare(_job(given))
    if dry_run:
        _show_plan(prepared, out, as_json, quiet)
        return
    report = _carried_out(prepared, folder, quiet, lines)
    if not as_json and not quiet:
        _show_report(report)
    pushed = None if target is None else push_made(out, target, quiet)
    if as_json:
        found = report.as_json() | ({"pushed": asdict(pushed)} if pushed else {})
        hand_over(*json.dumps(found, indent=1).splitlines())
    elif pushed is not None and not quiet:
        show_pushed(pushed)
        for further in report.also.values():
            say(f"{further.out} was not uploaded; `streamconv push` does that, to a repository of its own")


def _carried_out(prepared: Prepared, out: Path, quiet: bool, lines: JsonLines | None) -> Report:
    """Fetch what is missing, and run the job, with bars or lines of JSON."""
    from streamconv.pipeline import fetch, run
    from streamconv.progress import Turn

    if lines is not None:
        if prepared.downloads():
            lines.begin("download")
            fetch(prepared, out, lines.progress)
        lines.begin("open")
        with stop_on_signals() as stop:
            report = run(prepared, out, lines.progress, stop, lines.turn)
        lines.turn(Turn("done"))
        return report
    _fetch(prepared, out, quiet)
    title = "merge" if prepared.adapter else "convert"
    with stop_on_signals() as stop, progress(title, quiet) as on_progress:
        return run(prepared, out, on_progress, stop)


def _refuse_part(given: Mapping[str, Any]) -> None:
    """Raise OptionError for an upload by one of several workers, of whom none knows that it will be the last."""
    if given["part"] is not None:
        raise OptionError(
            "--push-to is for one worker that makes all; leave it out, and `streamconv push` what the parts have made"
        )


def _job(given: Mapping[str, Any]) -> Job:
    from streamconv.pipeline import build_job

    others = {*PUSHING, "no_resume"}
    options = {name: value for name, value in given.items() if name not in others}
    options["part"] = named_part(options["part"])
    return build_job(**options, resume=not given["no_resume"])


def _fetch(prepared: Prepared, out: Path, quiet: bool) -> None:
    from streamconv.pipeline import fetch

    if prepared.downloads():
        with progress("download", quiet) as on_progress:
            fetch(prepared, out, on_progress)


def _show_plan(prepared: Prepared, out: str | None, as_json: bool, quiet: bool) -> None:
    from streamconv.pipeline import check_contents, check_out, output_folder
    from streamconv.pipeline.shown import plan_as_json, plan_as_text

    if out is not None:
        check_out(prepared, output_folder(out))
    check_contents(prepared)
    if as_json:
        answer(*json.dumps(plan_as_json(prepared), indent=1).splitlines())
    elif not quiet:
        answer(*plan_as_text(prepared).split("\n"))


def _show_report(report: Report) -> None:
    """Show the outcome of each output, and the time of all that were made now."""
    if report.renamed:
        say(f"names of adapter and base were matched: {report.renamed}")
    for note in report.notes:
        say(f"note: {note}")
    if report.part is not None and report.left is not None:
        _show_part(report)
        return
    reports = [report, *report.also.values()]
    made = [each for each in reports if each.seconds]
    for each in reports:
        size = format_size(each.bytes_written)
        if each not in made:
            say(f"{each.out}: was complete already, {size}")
        elif len(made) == 1:
            say(f"{each.out}: {size} {_pace(made)}")
        else:
            say(f"{each.out}: {size}")
        if each.kept_delta is not None:
            say(f"{each.kept_delta:.1%} of the fine-tune kept by {each.rounding} rounding to {each.quant}")
        if each.rescaled:
            say(_rescaled(each.rescaled))
        if each.residual is not None:
            say(_residual(each.out, each.residual))
    if len(made) > 1:
        say(f"{len(made)} outputs: {format_size(sum(each.bytes_written for each in made))} {_pace(made)}")


def _show_part(report: Report) -> None:
    size, count = format_size(report.bytes_written), len(report.shards)
    say(f"{report.out}: {report.part} is made, {count} file{'s' * (count != 1)}, {size} {_pace([report])}")
    if report.left:
        names = ", ".join(report.left[:3]) + (" ..." if len(report.left) > 3 else "")
        say(
            f"{len(report.left)} files are left ({names}); the worker that ends last puts the output in place"
        )
    else:
        say("all files are made; a worker that is still at it puts the output in place")


def _rescaled(pairs: Mapping[str, Mapping[str, float]]) -> str:
    known = [each for each in pairs.values() if "relative_error" in each]
    before, after = (
        (sum(each[key] ** 2 for each in known) / max(1, len(known))) ** 0.5
        for key in ("unscaled_error", "relative_error")
    )
    return (
        f"{len(pairs)} pairs of weights rescaled: nearest rounding changes what they feed by {after:.1%} where it was "
        f"{before:.1%}, by the calibration text"
    )


def _residual(out: str, residual: Mapping[str, Any]) -> str:
    share = f"takes away {residual['removed'] or 0:.1%} of the error of these codes, by the calibration text"
    return f"{out}/residual: an adapter of rank {residual['rank']}, {format_size(residual['bytes'])}: {share}"


def _pace(made: Sequence[Report]) -> str:
    seconds = made[0].seconds
    written = sum(each.bytes_written for each in made)
    how = "resumed" if any(each.resumed for each in made) else f"{format_size(written / seconds)}/s"
    return f"in {seconds:.1f} s ({how}), peak memory {format_size(made[0].peak_ram_bytes)}"
