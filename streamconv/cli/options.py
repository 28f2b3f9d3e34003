"""The options, in the groups that commands share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import click
from click.core import ParameterSource

from streamconv.cli.blocks import F, Place, Section, Size, given_order, group, option
from streamconv.cli.completion import COMBINE_NAMES, ROUNDING_NAMES, TRAINED_ON, every, words
from streamconv.cli.exits import set_debug
from streamconv.escapes import one_line
from streamconv.planning.options import MERGE_DEFAULTS


class _OneLine(logging.Formatter):
    """Messages on one line each, whatever the names in them hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        return one_line(super().formatMessage(record))


def _set_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del ctx, param
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("streamconv").setLevel(logging.INFO if value else logging.WARNING)


def _only_one(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | None:
    """The one adapter given. Of an option that is given twice, click alone would drop the first and say nothing."""
    if len(value) > 1:
        raise click.BadParameter(
            f"{ctx.command.name} is about one adapter; merge several first, with `streamconv merge`",
            ctx,
            param,
        )
    return value[0] if value else None


def _any_number(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Any:
    """The adapters given: one by itself, several in their order, None without one."""
    del ctx, param
    return value if len(value) > 1 else next(iter(value), None)


def _by_adapter(ctx: click.Context, param: click.Parameter, value: tuple[float, ...]) -> tuple[float, ...]:
    """A weight for each adapter of the command line, 1 for one that none follows; others as they are given."""
    order = given_order(ctx)
    if "adapter" not in order or ctx.get_parameter_source(str(param.name)) is not ParameterSource.COMMANDLINE:
        return value
    weights, left = list[float](), iter(value)
    for before, name in pairwise(("", *order)):
        if name == "weight" and before != "adapter":
            where = "a second one stands after the same --adapter" if weights else "none stands before it"
            raise click.BadParameter(f"a weight belongs to the --adapter before it, and {where}", ctx, param)
        if name == "adapter":
            weights.append(1.0)
        else:
            weights[-1] = next(left)
    return tuple(weights)


FOLDER = Place(readable=False)


def base_option(**attributes: Any) -> Callable[[F], F]:
    names = ("--base", "--base-model", "--model", "base")
    return option(Section.INPUTS, *names, type=FOLDER, metavar="MODEL", **attributes)


def adapter_option(**attributes: Any) -> Callable[[F], F]:
    return option(
        Section.INPUTS,
        "--adapter",
        type=FOLDER,
        metavar="ADAPTER",
        multiple=True,
        **{"callback": _only_one, **attributes},
    )


def adapters_option(**attributes: Any) -> Callable[[F], F]:
    """The same, of which there may be several."""
    return adapter_option(callback=_any_number, **attributes)


def out_option(**attributes: Any) -> Callable[[F], F]:
    return option(Section.INPUTS, "-o", "--out", type=FOLDER, metavar="DIR", **attributes)


_BASE_HELP = (
    "The base model: a folder, a Hub id (org/name, org/name@revision), or s3://, gs://, az:// and a path."
)
_NAMED_HELP = f"{_BASE_HELP} Default: the one that the adapter names."
ADAPTER_HELP = "The PEFT adapter: a folder, a Hub id, or s3://, gs://, az:// and a path"
BASE = base_option(help=_NAMED_HELP)
CONVERTED = base_option(required=True, help=_BASE_HELP)
BASE_REVISION = option(
    Section.INPUTS,
    "--base-revision",
    defaults=MERGE_DEFAULTS,
    metavar="REV",
    help="Branch, tag or commit of a base from the Hub. Default: main.",
)
ADAPTER_PLACE = group(
    option(
        Section.INPUTS,
        "--adapter-revision",
        defaults=MERGE_DEFAULTS,
        metavar="REV",
        help="The same of an adapter from the Hub.",
    ),
    option(
        Section.INPUTS,
        "--adapter-subfolder",
        defaults=MERGE_DEFAULTS,
        metavar="NAME",
        help="Folder inside the adapter's, such as checkpoint-1200.",
    ),
)
OUT = out_option(required=True, help="Folder to write the result to.")
RESULT = group(
    option(
        Section.RESULT,
        "--quant",
        defaults=MERGE_DEFAULTS,
        metavar="FORMAT",
        shell_complete=words("keep", "none", rows=every),
        help="keep: the base's own format; none: 16/32 bit; or a format that `streamconv formats` lists.",
    ),
    option(
        Section.RESULT,
        "--also",
        defaults=MERGE_DEFAULTS,
        multiple=True,
        metavar="FORMAT",
        shell_complete=words("none", rows=every),
        help="A further output from the same read, in the folder DIR/FORMAT: none, or a format as in --quant. "
        "Repeatable.",
    ),
    option(
        Section.RESULT,
        "--group-size",
        defaults=MERGE_DEFAULTS,
        type=int,
        metavar="N",
        help="Elements of a row that share a scale, in formats with groups: 32, 64 or 128. Default: the "
        "largest that most weights' rows are whole groups of, or that of a base that keeps its format.",
    ),
    option(
        Section.RESULT,
        "--dtype",
        defaults=MERGE_DEFAULTS,
        metavar="DTYPE",
        shell_complete=words("auto", "float32", "float16", "bfloat16"),
        help="float32, float16, bfloat16; auto: what each tensor has in the base.",
    ),
    option(
        Section.RESULT,
        "--rounding",
        defaults=MERGE_DEFAULTS,
        metavar="NAME",
        shell_complete=words("auto", *ROUNDING_NAMES),
        help="How 4-bit codes are chosen: nearest, stochastic, adaptive (either, by the size of the update), search, "
        "feedback (with --calibration); auto: what keeps the fine-tune, feedback where there is calibration text.",
    ),
    option(
        Section.RESULT,
        "--calibration",
        defaults=MERGE_DEFAULTS,
        type=FOLDER,
        metavar="FILE|DATASET",
        help="Choose codes by what the layers do with this text: a .txt, a .jsonl with text or messages, or a data set "
        "of the Hub, org/name[@revision][:split]. Needs streamconv[eval].",
    ),
    option(
        Section.RESULT,
        "--calibration-tokens",
        defaults=MERGE_DEFAULTS,
        metavar="N",
        help="Tokens to take from the beginning of that text.",
    ),
    option(
        Section.RESULT,
        "--calibration-sequence-length",
        defaults=MERGE_DEFAULTS,
        type=int,
        metavar="N",
        help="Tokens in a sequence of it. Default: 2048, or what the model has positions for.",
    ),
    option(
        Section.RESULT,
        "--calibration-gradient-tokens",
        defaults=MERGE_DEFAULTS,
        metavar="N",
        help="Tokens of it whose gradients tell what each output of a layer counts for the model; 0: all count alike, "
        "in less time.",
    ),
    option(
        Section.RESULT,
        "--rescale",
        defaults=MERGE_DEFAULTS,
        metavar="NAME",
        shell_complete=words("none", "awq"),
        help="With --calibration: awq divides norms and weights and multiplies what reads them, so that inputs that "
        "are large on that text are rounded best; for families of models whose layers are known.",
    ),
    option(
        Section.RESULT,
        "--residual-rank",
        defaults=MERGE_DEFAULTS,
        metavar="R",
        help="With --calibration: write a PEFT adapter of this rank, such as 16, to DIR/residual, which repairs part "
        "of what rounding changed in the outputs of the layers; 0: none.",
    ),
    option(
        Section.RESULT,
        "--seed",
        defaults=MERGE_DEFAULTS,
        help="Seed of stochastic and adaptive rounding, and of --combine dare_linear and dare_ties.",
    ),
    option(
        Section.RESULT,
        "--ignore",
        defaults=MERGE_DEFAULTS,
        multiple=True,
        metavar="PATTERN",
        help="Further modules left in 16 bit: part of a module path, or re:REGEX. Repeatable.",
    ),
    option(
        Section.RESULT,
        "--quant-for",
        defaults=MERGE_DEFAULTS,
        multiple=True,
        metavar="PATTERN=FORMAT",
        help="Format of the modules that PATTERN names, as in --ignore: none, or one that loaders open beside that of "
        "--quant, such as w8a16 with w4a16; w8a16:g64 for groups of 64. Repeatable; of several that name a module, the "
        "last counts.",
    ),
    option(
        Section.RESULT,
        "--gguf-donor",
        defaults=MERGE_DEFAULTS,
        type=FOLDER,
        metavar="FILE",
        help="With --quant gguf:TYPE: a GGUF file of the base model that others made, whose tokenizer is taken, and "
        "what its header says of the model beyond config.json; for tokenizers that cannot be written otherwise.",
    ),
    option(
        Section.RESULT,
        "--max-shard-size",
        defaults=MERGE_DEFAULTS,
        type=Size(),
        metavar="SIZE",
        help="Largest output file, such as 5GB. Default: the base's own shards for 16-bit output, else 5GB.",
    ),
)
ALLOW_PICKLE = option(
    Section.INPUTS,
    "--allow-pickle",
    defaults=MERGE_DEFAULTS,
    is_flag=True,
    help="Read pytorch_model.bin, adapter_model.bin and pickles of weights beside it, opened so that they can hold "
    "nothing but tensors.",
)
IGNORE_EXTRA = option(
    Section.MERGE,
    "--ignore-extra",
    defaults=MERGE_DEFAULTS,
    multiple=True,
    metavar="FILE",
    help="File of trained weights beside the adapter that is left out. Repeatable.",
)
MERGE_BASE = option(
    Section.MERGE,
    "--merge-base",
    defaults=MERGE_DEFAULTS,
    metavar="FORMAT",
    shell_complete=words("original", *TRAINED_ON),
    help="What the update is added to: original, or the base rounded to nf4, nf4-dq, fp4, fp4-dq or int8 "
    "as in training.",
)
TOKENIZER = option(
    Section.MERGE,
    "--tokenizer",
    defaults=MERGE_DEFAULTS,
    type=click.Choice(["auto", "base", "adapter"]),
    help="Whose tokenizer files to copy; auto: the adapter's where it extends or changes the base's (chat template, "
    "end token, added tokens) and the ids of the base's tokens stay the same, else the base's.",
)
MOE_LAYOUT = option(
    Section.MERGE,
    "--moe-layout",
    defaults=MERGE_DEFAULTS,
    metavar="WORDS",
    help="How LoRA factors of fused experts are packed where nothing tells: last or middle (the axis lora_A runs "
    "along), rank-major or expert-major (lora_B), or one of each with a comma between.",
)
ALLOW_MISSING = option(
    Section.MERGE,
    "--allow-missing",
    defaults=MERGE_DEFAULTS,
    is_flag=True,
    help="Leave weights as they are that the adapter targets and holds no tensors for, and say which, in place of "
    "refusing it.",
)
TARGET = group(
    option(
        Section.MERGE,
        "--weight",
        defaults=MERGE_DEFAULTS,
        type=float,
        multiple=True,
        callback=_by_adapter,
        metavar="W",
        help="How much the --adapter before it counts; negative ones take its update away. Default: 1.",
    ),
    option(
        Section.MERGE,
        "--combine",
        defaults=MERGE_DEFAULTS,
        metavar="NAME",
        shell_complete=words(*COMBINE_NAMES),
        help="How several adapters are combined, as PEFT's add_weighted_adapter has it: linear, cat, ties, "
        "dare_linear, dare_ties, magnitude_prune, svd. Default: their updates are added.",
    ),
    option(
        Section.MERGE,
        "--density",
        defaults=MERGE_DEFAULTS,
        type=float,
        metavar="SHARE",
        help="With --combine ties, magnitude_prune or one of dare: the share of values that is kept.",
    ),
    MERGE_BASE,
    option(
        Section.MERGE,
        "--preserve-delta",
        defaults=MERGE_DEFAULTS,
        metavar="MU",
        help="How much calibration spares the directions that the adapter works in, such as 0.3, so that more of the "
        "update is kept weight by weight; auto: not at all, which keeps predictions nearer.",
    ),
    option(
        Section.MERGE,
        "--min-kept",
        defaults=MERGE_DEFAULTS,
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Refuse a quantized result that keeps less than this share of the fine-tune. "
        "Default: 0.2, and 0 where --rounding names one.",
    ),
    TOKENIZER,
    MOE_LAYOUT,
    ALLOW_MISSING,
    ALLOW_PICKLE,
    IGNORE_EXTRA,
)


def resources(defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """Options of device and memory, with their `defaults`."""
    return group(
        option(
            Section.RESOURCES,
            "--device",
            defaults=defaults,
            help="auto, cpu, cuda (every GPU like the first) or cuda:N.",
        ),
        option(
            Section.RESOURCES,
            "--max-ram",
            defaults=defaults,
            type=Size(),
            metavar="SIZE",
            help="Memory above the interpreter with torch loaded.",
        ),
        option(
            Section.RESOURCES,
            "--max-vram",
            defaults=defaults,
            type=Size(),
            metavar="SIZE",
            help="Memory of each GPU.",
        ),
    )


RESOURCES = resources(MERGE_DEFAULTS)
PLACE = group(
    option(
        Section.PLACE,
        "--part",
        defaults=MERGE_DEFAULTS,
        metavar="K/N",
        help="Make the share of worker K, from 1 to N, of an --out that all N workers see; the last to end puts the "
        "output in place. auto: K and N as torchrun, Slurm or SkyPilot set them for each worker; auto/N for "
        "Kubernetes, which sets K alone. Default: make all that is left, whatever started this.",
    ),
    option(
        Section.PLACE,
        "--overwrite",
        defaults=MERGE_DEFAULTS,
        is_flag=True,
        help="Replace the model in --out once the new one is complete.",
    ),
    option(
        Section.PLACE,
        "--no-resume",
        is_flag=True,
        help="Start anew instead of going on with an interrupted run.",
    ),
    option(
        Section.PLACE, "--dry-run", is_flag=True, help="Plan only: read headers, write nothing (as `plan`)."
    ),
    option(
        Section.PLACE,
        "--verify/--no-verify",
        defaults=MERGE_DEFAULTS,
        help="Reopen the finished output: names, shapes, sizes.",
    ),
    option(
        Section.PLACE,
        "--card/--no-card",
        defaults=MERGE_DEFAULTS,
        help="Write a model card (README.md).",
    ),
    option(
        Section.PLACE,
        "--copy-extra",
        defaults=MERGE_DEFAULTS,
        multiple=True,
        metavar="GLOB",
        help="Further files to copy. Repeatable.",
    ),
    option(
        Section.PLACE,
        "--low-disk",
        defaults=MERGE_DEFAULTS,
        is_flag=True,
        help="Remove each downloaded shard of the base after its last use.",
    ),
)


def push_options(revision: str) -> Callable[[F], F]:
    """Options of an upload; the branch to push to is the option `revision`."""
    return group(
        option(
            Section.UPLOAD,
            "--private/--public",
            "private",
            default=None,
            help="Who sees a repository that is made. Default: private.",
        ),
        option(Section.UPLOAD, "--create-pr", is_flag=True, help="Propose the upload as a pull request."),
        option(Section.UPLOAD, "--commit-message", metavar="TEXT", help="First line of the commit."),
        option(
            Section.UPLOAD,
            revision,
            "push_revision",
            metavar="BRANCH",
            help="Branch to push to. Default: main.",
        ),
    )


PUSH_TO = group(
    option(
        Section.UPLOAD,
        "--push-to",
        metavar="REPO",
        help="Upload the verified result to this Hub repository, org/name; those of --also are not uploaded.",
    ),
    push_options("--push-revision"),
)
JSON = option(
    Section.MESSAGES,
    "--json",
    "as_json",
    is_flag=True,
    envvar="STREAMCONV_JSON",
    help="Print the result as one JSON document on stdout.",
)
JSON_PROGRESS = option(
    Section.MESSAGES,
    "--json-progress",
    is_flag=True,
    help="Tell of progress on stderr in lines of JSON, for logs that programs read: at each phase and file, and every "
    "5 seconds.",
)
DEBUG = option(
    Section.MESSAGES,
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=set_debug,
    help="Show the traceback of an error.",
)
SHOW = group(
    JSON,
    option(Section.MESSAGES, "-q", "--quiet", is_flag=True, help="No progress, no summary."),
    option(
        Section.MESSAGES,
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        help="Tell on stderr what is done.",
    ),
    DEBUG,
)
