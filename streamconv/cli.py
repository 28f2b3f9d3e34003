"""The command line: parse, call the library, show. Decides nothing.

What a command needs is imported inside it: torch takes seconds, and `--help` or a mistyped option should answer
at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamconv.errors import OptionError, Stopped, StreamconvError
from streamconv.sizes import format_size, parse_size

if TYPE_CHECKING:
    from streamconv.executor import StopRequest
    from streamconv.pipeline import Job, OnProgress, Prepared
    from streamconv.report.result import Report
    from streamconv.storage.upload import Pushed, Target

F = TypeVar("F", bound=Callable[..., Any])

_DEBUG = "streamconv.debug"
_INPUTS, _RESULT, _MERGE, _RESOURCES, _PLACE, _HUB, _MESSAGES = (
    "Inputs and output",
    "Result",
    "Merge",
    "Resources",
    "Output folder",
    "Upload",
    "Messages",
)

_LINE_EVERY_S = 30.0


class _Size(click.ParamType[int]):
    """`5GB`, `512MiB`; becomes a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Option(click.Option):
    """An option that help lists under the heading `section`."""

    def __init__(self, *args: Any, section: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


class _Command(click.Command):
    """Lists options by section, in the order of their first options; `--max-ram` is STREAMCONV_MAX_RAM, too."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        # Of its own, as click would put the command's name between the two.
        self.context_settings.setdefault("auto_envvar_prefix", "STREAMCONV")
        # Also of its own: click keeps the option that the first context made, be it one without a parent.
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, records in sections(self, ctx).items():
            with formatter.section(section):
                formatter.write_dl(records)


def sections(command: click.Command, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
    """What help and docs/cli.md say of each option, by the heading it stands under."""
    found: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            section = param.section if isinstance(param, _Option) else _MESSAGES
            found.setdefault(section, []).append(record)
    return found


class _Commands(click.Group):
    """Lists commands as they are defined; turns every deliberate error into one line and its exit code."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StreamconvError as error:
            if ctx.meta.get(_DEBUG):
                raise
            prefix = "" if isinstance(error, Stopped) else "Error: "
            click.echo(f"{prefix}{_one_line(str(error))}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(128 + signal.SIGINT)


def _one_line(message: str) -> str:
    """Names come from files that anyone may have written: none may break the line or steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    ctx.meta[_DEBUG] = value


def _set_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del ctx, param
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("streamconv").setLevel(logging.INFO if value else logging.WARNING)


def _only_one(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | None:
    """The one adapter given. Of an option that is given twice, click alone would drop the first and say nothing."""
    if len(value) > 1:
        raise click.BadParameter(
            "several adapters are not supported yet; merge them one after another", ctx, param
        )
    return value[0] if value else None


def _option(section: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    return click.option(*names, cls=_Option, section=section, **attributes)


def _group(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


class _Place(click.Path):
    """A folder or a Hub id: only for completion, since what is wrong with either we say better."""

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """STREAMCONV_ADAPTER is split as paths are, but not within hf://."""
        return re.split(rf"{re.escape(os.pathsep)}(?!//)", rv)


_FOLDER = _Place(readable=False)


def _base(**attributes: Any) -> Callable[[F], F]:
    names = ("--base", "--base-model", "--model", "base")
    return _option(_INPUTS, *names, type=_FOLDER, metavar="MODEL", **attributes)


def _adapter(**attributes: Any) -> Callable[[F], F]:
    return _option(
        _INPUTS, "--adapter", type=_FOLDER, metavar="ADAPTER", multiple=True, callback=_only_one, **attributes
    )


def _out(**attributes: Any) -> Callable[[F], F]:
    return _option(_INPUTS, "-o", "--out", type=_FOLDER, metavar="DIR", **attributes)


_BASE_HELP = "The base model: a folder, or a Hub id: org/name, org/name@revision."
_ADAPTER_HELP = "The PEFT adapter: a folder or a Hub id"
_base_required = _base(required=True, help=_BASE_HELP)
_base_revision = _option(
    _INPUTS,
    "--base-revision",
    metavar="REV",
    help="Branch, tag or commit of a base from the Hub. Default: main.",
)
_adapter_place = _group(
    _option(_INPUTS, "--adapter-revision", metavar="REV", help="The same of an adapter from the Hub."),
    _option(
        _INPUTS,
        "--adapter-subfolder",
        metavar="NAME",
        help="Folder inside the adapter's, such as checkpoint-1200.",
    ),
)
_out_required = _out(required=True, help="Folder to write the result to.")
_result = _group(
    _option(
        _RESULT,
        "--quant",
        default="keep",
        show_default=True,
        metavar="FORMAT",
        help="keep: the base's own format; none: 16/32 bit; or a format that `streamconv formats` lists.",
    ),
    _option(
        _RESULT,
        "--dtype",
        default="auto",
        show_default=True,
        metavar="DTYPE",
        help="float32, float16, bfloat16; auto: what each tensor has in the base.",
    ),
    _option(
        _RESULT,
        "--rounding",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="How 4-bit codes are chosen: nearest, stochastic; auto: what keeps the fine-tune.",
    ),
    _option(_RESULT, "--seed", default=0, show_default=True, help="Seed of stochastic rounding."),
    _option(
        _RESULT,
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Further modules left in 16 bit: part of a module path, or re:REGEX. Repeatable.",
    ),
    _option(
        _RESULT,
        "--max-shard-size",
        type=_Size(),
        metavar="SIZE",
        help="Largest output file, such as 5GB. Default: the base's own shards for 16-bit output, else 5GB.",
    ),
)
_allow_pickle = _option(
    _MERGE,
    "--allow-pickle",
    is_flag=True,
    help="Read adapter_model.bin: a pickle, opened so that it can hold nothing but tensors.",
)
_target = _group(
    _option(
        _MERGE,
        "--merge-base",
        default="original",
        show_default=True,
        metavar="FORMAT",
        help="What the update is added to: original, or the base rounded to nf4, nf4-dq, fp4, fp4-dq or int8 "
        "as in training.",
    ),
    _option(
        _MERGE,
        "--min-kept",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Refuse a quantized result that keeps less than this share of the fine-tune. "
        "Default: 0.2, and 0 where --rounding names one.",
    ),
    _option(
        _MERGE,
        "--tokenizer",
        type=click.Choice(["auto", "base", "adapter"]),
        default="auto",
        show_default=True,
        help="Whose tokenizer files to copy.",
    ),
    _option(
        _MERGE,
        "--moe-layout",
        default="auto",
        show_default=True,
        metavar="WORDS",
        help="How LoRA factors of fused experts are packed where nothing tells: last or middle (the axis lora_A runs "
        "along), rank-major or expert-major (lora_B), or one of each with a comma between.",
    ),
    _allow_pickle,
)
_resources = _group(
    _option(_RESOURCES, "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    _option(
        _RESOURCES,
        "--max-ram",
        type=_Size(),
        default="1GiB",
        show_default=True,
        metavar="SIZE",
        help="Memory above the interpreter with torch loaded.",
    ),
    _option(
        _RESOURCES,
        "--max-vram",
        type=_Size(),
        default="2GiB",
        show_default=True,
        metavar="SIZE",
        help="GPU memory.",
    ),
)
_place = _group(
    _option(
        _PLACE, "--overwrite", is_flag=True, help="Replace the model in --out once the new one is complete."
    ),
    _option(
        _PLACE, "--no-resume", is_flag=True, help="Start anew instead of going on with an interrupted run."
    ),
    _option(_PLACE, "--dry-run", is_flag=True, help="Plan only: read headers, write nothing (as `plan`)."),
    _option(
        _PLACE,
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Reopen the finished output: names, shapes, sizes.",
    ),
    _option(
        _PLACE, "--card/--no-card", default=True, show_default=True, help="Write a model card (README.md)."
    ),
    _option(_PLACE, "--copy-extra", multiple=True, metavar="GLOB", help="Further files to copy. Repeatable."),
)


def _push_options(revision: str) -> Callable[[F], F]:
    """How to push; the branch to push to is the option `revision`."""
    return _group(
        _option(
            _HUB,
            "--private/--public",
            "private",
            default=None,
            help="Who sees a repository that is made. Default: private.",
        ),
        _option(_HUB, "--create-pr", is_flag=True, help="Propose the upload as a pull request."),
        _option(_HUB, "--commit-message", metavar="TEXT", help="First line of the commit."),
        _option(_HUB, revision, "push_revision", metavar="BRANCH", help="Branch to push to. Default: main."),
    )


_push_to = _group(
    _option(
        _HUB, "--push-to", metavar="REPO", help="Upload the verified result to this Hub repository, org/name."
    ),
    _push_options("--push-revision"),
)
_json = _option(
    _MESSAGES,
    "--json",
    "as_json",
    is_flag=True,
    envvar="STREAMCONV_JSON",
    help="Print the result as one JSON document on stdout.",
)
_debug = _option(
    _MESSAGES,
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show the traceback of an error.",
)
_show = _group(
    _json,
    _option(_MESSAGES, "-q", "--quiet", is_flag=True, help="No progress, no summary."),
    _option(
        _MESSAGES,
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        help="Tell on stderr what is done.",
    ),
    _debug,
)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version
        from platform import python_version

        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes", "safetensors"))
        click.echo(f"streamconv {version('streamconv')} (Python {python_version()}, {libraries})")
        ctx.exit()


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version.",
)
def main() -> None:
    """Merge LoRA and QLoRA adapters into models of any size, and quantize the result.

    Weights stream from disk to disk in small tiles: memory does not grow with the model. Interrupted runs go on
    where they stopped when the same command is given again.

    Every option can be set in the environment, too: --max-ram as STREAMCONV_MAX_RAM.

    Exit codes: 0 done, 1 bug, 2 usage, 3 input, 4 output folder, 5 disk or memory, 6 network,
    7 verification or lost fine-tune, 130/143 stopped by a signal.
    """


@main.command("merge")
@_group(
    _base_required,
    _base_revision,
    _adapter(required=True, help=f"{_ADAPTER_HELP}."),
    _adapter_place,
    _out_required,
    _result,
    _target,
    _resources,
    _place,
    _push_to,
    _show,
)
def merge_command(out: str, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Merge an adapter into a base model.

    \b
    streamconv merge --base ./llama --adapter ./my-lora -o ./merged
    streamconv merge --base ./llama --adapter ./my-qlora --merge-base nf4-dq --quant nf4-dq -o ./merged-4bit
    streamconv merge --base org/llama --adapter me/my-lora@v2 --push-to me/merged -o ./merged
    """
    _run_job(given, out, dry_run, as_json, quiet)


@main.command("convert")
@_group(_base_required, _base_revision, _out_required, _result, _resources, _place, _push_to, _show)
def convert_command(out: str, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Quantize, dequantize or reshard a model, without an adapter.

    \b
    streamconv convert --base ./llama --quant nf4-dq -o ./llama-4bit
    streamconv convert --base ./llama-4bit --quant none -o ./llama-16bit
    """
    _run_job(given, out, dry_run, as_json, quiet)


@main.command("plan")
@_group(
    _base_required,
    _base_revision,
    _adapter(help=f"{_ADAPTER_HELP}; without it: as `convert`."),
    _adapter_place,
    _out(help="Folder the result would go to: checked, not touched."),
    _result,
    _target,
    _resources,
    _place,
    _show,
)
def plan_command(out: str | None, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show what merge or convert would do, without writing: files, sizes, memory, matched modules, choices."""
    del dry_run
    from streamconv.pipeline import prepare

    _show_plan(prepare(_job(given)), out, as_json, quiet)


@main.command("inspect")
@click.argument("path", type=_FOLDER)
@_group(
    _option(_INPUTS, "--revision", metavar="REV", help="Branch, tag or commit of a Hub id. Default: main."),
    _json,
    _debug,
)
def inspect_command(path: str, revision: str | None, as_json: bool) -> None:
    """Show what a checkpoint or adapter holds: a folder, or a Hub id, of which headers are enough."""
    from streamconv.inspection import inspect

    found = inspect(path, revision=revision)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        click.echo(f"{key.replace('_', ' '):16} {_fact(key, value)}")


def _fact(key: str, value: Any) -> str:
    match key:
        case "shards":
            first = ", ".join(f"{shard['name']} ({format_size(shard['bytes'])})" for shard in value[:4])
            return f"{len(value)}: {first}"
        case "weights":
            return ", ".join(f"{n['count']} {name} ({format_size(n['bytes'])})" for name, n in value.items())
        case "bytes":
            return format_size(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


@main.command("verify")
@click.argument("out", type=_FOLDER)
@_group(
    _option(
        _INPUTS,
        "--full",
        is_flag=True,
        help="Compute the result again from --base and --adapter, and compare.",
    ),
    _base(allow_from_autoenv=False, help="The base it was made from; for --full."),
    _base_revision,
    _adapter(allow_from_autoenv=False, help="The adapter it was made from; for --full."),
    _adapter_place,
    _allow_pickle,
    _option(
        _RESOURCES,
        "--device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:N; for --full.",
    ),
    _show,
)
def verify_command(out: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Recheck a finished output against its streamconv.json: sizes, hashes, layout."""
    from dataclasses import asdict

    from streamconv.pipeline import verify

    with _progress("verify", quiet) as on_progress:
        checked = verify(out, on_progress=on_progress, **given)
    if as_json:
        click.echo(json.dumps(asdict(checked)))
    elif not quiet:
        how = "computed again, equal byte for byte" if checked.exact else "sizes, hashes and layout are right"
        click.echo(
            f"{out}: {checked.tensors} tensors in {_shards(checked.shards)}, {format_size(checked.bytes)}: {how}"
        )


@main.command("push")
@click.argument("out", type=_FOLDER)
@click.argument("repo")
@_group(_push_options("--revision"), _show)
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
        _hush_hub()
    pushed = _push(out, target, quiet)
    if as_json:
        click.echo(json.dumps(asdict(pushed), indent=1))
    elif not quiet:
        _show_pushed(pushed)


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


@main.command("formats")
@_json
def formats_command(as_json: bool) -> None:
    """List the formats that can be read and written."""
    from streamconv.formats import FORMATS

    rows = [
        {
            "name": fmt.name,
            "bits_per_weight": fmt.bits_per_weight,
            "calibration": False,
            "loaders": fmt.loaders,
        }
        for fmt in FORMATS.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(f"{'name':10} {'bits/weight':>11}  {'calibration':11}  opened by")
    for row in rows:
        click.echo(f"{row['name']:10} {row['bits_per_weight']:11.3f}  {'not needed':11}  {row['loaders']}")


# -- from options to a run, and what is shown of it ----------------------------------------------------------


def _job(given: Mapping[str, Any]) -> Job:
    from streamconv.pipeline import Job, merge_options

    return Job(
        base=given["base"],
        adapter=given.get("adapter"),
        options=merge_options(
            given["quant"],
            given["dtype"],
            given["rounding"],
            given.get("merge_base", "original"),
            given["seed"],
            given.get("min_kept"),
            given["ignore"],
            given["max_ram"],
            given["max_vram"],
            given["max_shard_size"],
            given.get("moe_layout", "auto"),
        ),
        device=given["device"],
        overwrite=given["overwrite"],
        resume=not given["no_resume"],
        verify=given["verify"],
        card=given["card"],
        tokenizer=given.get("tokenizer", "base"),
        copy_extra=given["copy_extra"],
        allow_pickle=given.get("allow_pickle", False),
        base_revision=given["base_revision"],
        adapter_revision=given.get("adapter_revision"),
        adapter_subfolder=given.get("adapter_subfolder"),
    )


def _push_target(repo: str | None, given: Mapping[str, Any]) -> Target | None:
    """Where to push, as the options say; None if there is nothing to push."""
    from streamconv.storage.upload import parse_target

    extras = (given["private"], given["create_pr"], given["commit_message"], given["push_revision"])
    if repo is not None:
        return parse_target(repo, *extras)
    if any(extra not in (None, False) for extra in extras) or given["private"] is False:
        raise OptionError(
            "--private, --public, --create-pr, --commit-message and --push-revision say how to push; add --push-to"
            " REPO, or leave them out"
        )
    return None


def _run_job(given: Mapping[str, Any], out: str, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from streamconv.pipeline import output_folder, prepare, run

    if quiet:
        _hush_hub()
    folder = output_folder(out)
    target = _push_target(given["push_to"], given)
    if target is not None:
        _check_target(target)
    # Nothing is written yet that a signal could leave half done: it just ends the process.
    prepared = prepare(_job(given))
    if dry_run:
        _show_plan(prepared, out, as_json, quiet)
        return
    _fetch(prepared, folder, quiet)
    title = "merge" if prepared.adapter else "convert"
    with _stop_on_signals() as stop, _progress(title, quiet) as on_progress:
        report = run(prepared, folder, on_progress, stop)
    if not as_json and not quiet:
        _show_report(report)
    pushed = None if target is None else _push(out, target, quiet)
    if as_json:
        found = report.as_json() | ({"pushed": asdict(pushed)} if pushed else {})
        click.echo(json.dumps(found, indent=1))
    elif pushed is not None and not quiet:
        _show_pushed(pushed)


def _hush_hub() -> None:
    """huggingface_hub tells of its retries on stderr, which is good to know, but not where quiet was asked for."""
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(hub_logging.ERROR)


def _check_target(target: Target) -> None:
    """Refuse before the work what would be refused after it."""
    from streamconv.report.result import MANIFEST
    from streamconv.storage.upload import check_target

    check_target(target, MANIFEST)


def _fetch(prepared: Prepared, out: Path, quiet: bool) -> None:
    from streamconv.pipeline import fetch

    if prepared.downloads():
        with _progress("download", quiet) as on_progress:
            fetch(prepared, out, on_progress)


def _push(out: str, target: Target, quiet: bool) -> Pushed:
    from streamconv.pipeline import push_output

    with _on_signals(_leave), _progress("verify", quiet) as on_progress:
        return push_output(out, target, not quiet and sys.stderr.isatty(), on_progress)


def _show_plan(prepared: Prepared, out: str | None, as_json: bool, quiet: bool) -> None:
    from streamconv.pipeline import check_out, output_folder
    from streamconv.report.plan import plan_as_json, plan_as_text

    if out is not None:
        check_out(prepared, output_folder(out))
    if as_json:
        click.echo(json.dumps(plan_as_json(prepared), indent=1))
    elif not quiet:
        click.echo(plan_as_text(prepared))


def _show_pushed(pushed: Pushed) -> None:
    seen = "private" if pushed.private else "public"
    sent = f"{format_size(pushed.bytes)} uploaded" if pushed.bytes else "was complete already"
    where = pushed.pull_request or pushed.url
    click.echo(f"{where}: {pushed.files} files as on disk, {sent}, {seen}, commit {pushed.commit}")


def _show_report(report: Report) -> None:
    size = format_size(report.bytes_written)
    if report.resumed and not report.seconds:
        click.echo(f"{report.out}: was complete already, {size}")
    else:
        how = "resumed" if report.resumed else f"{format_size(report.bytes_written / report.seconds)}/s"
        peak = format_size(report.peak_ram_bytes)
        click.echo(f"{report.out}: {size} in {report.seconds:.1f} s ({how}), peak memory {peak}")
    if report.kept_delta is not None:
        click.echo(
            f"{report.kept_delta:.1%} of the fine-tune kept by {report.rounding} rounding to {report.quant}"
        )


@contextmanager
def _stop_on_signals() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM ask the run to stop at the next boundary; a second one ends it at once."""
    from streamconv.executor import StopRequest

    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.signal_number is not None:
            os._exit(128 + number)
        stop.signal_number = number
        os.write(2, b"\nstopping; everything finished is kept\n")

    with _on_signals(ask):
        yield stop


def _leave(number: int, frame: FrameType | None) -> None:
    """End an upload at once: huggingface_hub would first wait for all its threads, and there is nothing to save."""
    del frame
    signal.signal(number, signal.SIG_IGN)  # impatience need not be told twice
    os.write(2, b"\nstopped; the same command goes on\n")
    os._exit(128 + number)


@contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[OnProgress]:
    """A tqdm bar on a terminal; elsewhere one plain line every 30 seconds."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr) as bar:

            def draw(done: int, total: int) -> None:
                if bar.total is None:
                    bar.total, bar.n, bar.initial = total, done, done
                bar.update(done - bar.n)

            yield draw
    else:
        yield _plain_lines(title)


def _plain_lines(title: str) -> OnProgress:
    started = last = time.monotonic()
    first: int | None = None

    def tell(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None:
            first = done
        elif now - last >= _LINE_EVERY_S or done >= total:
            last = now
            speed = (done - first) / max(now - started, 1e-9)
            left = (total - done) / max(speed, 1.0)
            click.echo(
                f"{title}: {format_size(done)} of {format_size(total)}, {format_size(speed)}/s, {left:.0f} s left",
                err=True,
            )

    return tell
