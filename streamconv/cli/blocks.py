"""Building blocks of options and commands: headings in help, sizes, places, environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar, cast

import click

from streamconv.sizes import parse_size
from streamconv.system_errors import check_address_space
from streamconv.threads import check_threads

_ORDER, _NAMED = "streamconv.order", "streamconv.named"
# Options that nearly everybody uses, which help puts first where a command has more than so many.
_COMMON, _LONG = ("base", "adapter", "out", "quant", "merge_base", "calibration", "push_to"), 25
_MOST_OF_NUMPY = 64  # as its packages are built
F = TypeVar("F", bound=Callable[..., Any])


class Section(StrEnum):
    """Headings of help."""

    COMMON = "Most used"
    INPUTS = "Inputs and output"
    TEXT = "Text"
    STRATEGIES = "Strategies"
    REFERENCE = "Reference"
    RESULT = "Result"
    MERGE = "Merge"
    RESOURCES = "Resources"
    PLACE = "Output folder"
    UPLOAD = "Upload"
    RECIPE = "Recipe"
    MESSAGES = "Messages"


class Size(click.ParamType[int]):
    """`5GB`, `512MiB`; becomes a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Place(click.Path):
    """A folder or a Hub id: only for completion, since what is wrong with either we say better."""

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """STREAMCONV_ADAPTER is split as paths are, but not within hf://."""
        return re.split(rf"{re.escape(os.pathsep)}(?!//)", rv)


class Option(click.Option):
    """An option that help lists under the heading `section`."""

    def __init__(self, *args: Any, section: Section, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


class Places(click.Argument):
    """Places of a command without their options, as `merge BASE ADAPTER OUT`; `few` may be left out at the end."""

    def __init__(self, names: Sequence[str], few: int = 0) -> None:
        shown = [name.upper() for name in names]
        needed = len(names) - few
        metavar = " ".join([*shown[:needed], *(f"[{name}]" for name in shown[needed:])])
        super().__init__(
            ["places"], nargs=-1, is_eager=True, expose_value=False, metavar=f"[{metavar}]", type=Place()
        )
        self._names, self._needed = names, needed

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """Put the places where their options would have put them. Raises UsageError where they are too few or many."""
        found, left = super().handle_parse_result(ctx, opts, args)
        places = found if isinstance(found, tuple) else ()
        if not places or ctx.resilient_parsing:
            return found, left
        if not self._needed <= len(places) <= len(self._names):
            raise click.UsageError(
                f"{ctx.command.name} takes {str(self.metavar)[1:-1]} in this order, or the options --"
                f"{', --'.join(self._names)}; found {len(places)}: {' '.join(map(str, places))}",
                ctx,
            )
        for name, place in zip(self._names, places, strict=False):
            if name in ctx.meta.get(_NAMED, ()):
                raise click.UsageError(
                    f"--{name} is given, and {place} stands for it, too; leave one out", ctx
                )
            cast("dict[str, Any]", opts)[name] = (place,) if name == "adapter" else place
        return found, left


def places(*names: str, few: int = 0) -> Callable[[F], F]:
    """The argument for these options, before a command."""

    def add(function: F) -> F:
        vars(function).setdefault("__click_params__", []).append(Places(names, few))
        return function

    return add


class Command(click.Command):
    """Lists options by section, in the order of their first options; `--max-ram` is STREAMCONV_MAX_RAM, too."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        # Of its own, as click would put the command's name between the two.
        self.context_settings.setdefault("auto_envvar_prefix", "STREAMCONV")
        # Also of its own: click keeps the option that the first context made, be it one without a parent.
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note in which order options stand, which click keeps to itself, and parse as usual."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            ctx.meta[_ORDER] = [param.name for param in order]
            ctx.meta[_NAMED] = {param.name for param in order if isinstance(param, click.Option)}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        check_address_space()
        check_threads(_threads_of_numpy())
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, records in sections(self, ctx).items():
            with formatter.section(section):
                formatter.write_dl(records)


def _threads_of_numpy() -> int:
    """Threads that OpenBLAS starts when numpy is imported. Where it cannot, it sends its own process a Ctrl-C."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if (asked := os.environ.get(name, "")).isdecimal():
            return max(1, min(int(asked), _MOST_OF_NUMPY))
    return min(len(os.sched_getaffinity(0)), _MOST_OF_NUMPY)


def given_order(ctx: click.Context) -> list[str]:
    """Names of adapters' options on the command line, `adapter` and `weight`, in the order in which they stand."""
    return [name for name in ctx.meta.get(_ORDER, ()) if name in ("adapter", "weight")]


def sections(command: click.Command, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Sections of help and docs/cli.md, each option's text by the heading it stands under."""
    params = command.get_params(ctx)
    is_long = len(params) > _LONG
    found: dict[str, list[tuple[str, str]]] = {Section.COMMON: []} if is_long else {}
    for param in params:
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            section = param.section if isinstance(param, Option) else Section.MESSAGES
            found.setdefault(Section.COMMON if is_long and param.name in _COMMON else section, []).append(
                record
            )
    return found


def option(
    section: Section, *names: str, defaults: Mapping[str, Any] | None = None, **attributes: Any
) -> Callable[[F], F]:
    """An option under a heading of help. `defaults` are those of Python by keyword, of which it takes its own."""
    if defaults is not None:
        default = defaults[_keyword(names)]
        if default not in (None, ()) and default is not False:
            attributes |= {"default": default, "show_default": True}
    return click.option(*names, cls=Option, section=section, **attributes)


def _keyword(names: Sequence[str]) -> str:
    """The keyword in Python: the name that is given to click, or else the longest on the command line."""
    given = [name for name in names if not name.startswith("-")]
    return given[-1] if given else max(names, key=len).partition("/")[0].removeprefix("--").replace("-", "_")


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply
