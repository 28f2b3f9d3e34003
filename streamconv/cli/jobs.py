"""`merge`, `convert` and `plan`: from options to a run, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import group, places
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
from streamconv.cli.summary import summary, warnings
from streamconv.cli.uploads import PUSHING, check_before, hush_hub, push_made, push_target, show_pushed
from streamconv.errors import OptionError

if TYPE_CHECKING:
    from streamconv.output.manifest import Report
    from streamconv.pipeline import Job, Prepared


@click.command("merge", cls=JobCommand)
@group(
    places("base", "adapter", "out"),
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
    places("base", "out"),
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
    places("base", "adapter", "out", few=2),
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
    say(*warnings(report), err=True)
    if not as_json and not quiet:
        say(*summary(prepared, report))
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
