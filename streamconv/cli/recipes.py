"""`--recipe` and `--print-recipe`: options of a job from a file, and back."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli.blocks import Command, Option, Section, Size, group, option
from streamconv.cli.printing import answer
from streamconv.errors import OptionError
from streamconv.sizes import exact_size

if TYPE_CHECKING:
    from streamconv.output.recipe import Value

_TOKENS = {"token", "hf-token", "api-key"}


class JobCommand(Command):
    """A command that may print its options as a recipe instead of running."""

    def invoke(self, ctx: click.Context) -> Any:
        if not ctx.params.pop("print_recipe"):
            return super().invoke(ctx)
        from streamconv.output.recipe import write_recipe

        return answer(*write_recipe(dict(_resolved(self, ctx.params))).split("\n"))


def _load(ctx: click.Context, param: click.Parameter, paths: tuple[str, ...]) -> None:
    """Let the recipe's values stand for what neither command line nor environment says."""
    if len(paths) > 1:
        raise click.BadParameter("a command has one recipe; put all options into it", ctx, param)
    if paths and not ctx.resilient_parsing:
        ctx.default_map = _read(ctx, paths[0])


def _read(ctx: click.Context, path: str) -> dict[str, Any]:
    """The recipe's values by the names that click has for options. Raises OptionError."""
    from streamconv.output.recipe import read_recipe

    known = {name: setting for setting in _options(ctx.command) for name in _names(setting)}
    given: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    for key, value in read_recipe(path).items():
        found = known.get(key.replace("_", "-"))
        if found is None:
            raise OptionError(f"{path}: {_unknown(key.replace('_', '-'), known, ctx)}")
        if found.name in given:
            raise OptionError(f"{path}: {given[found.name]} and {key} are the same option; keep one")
        given[found.name] = key
        defaults[found.name] = _checked(found, value, f"{path}: {key}", ctx)
    return defaults


def _options(command: click.Command) -> Iterator[Option]:
    """The options a recipe may set: all but those about recipes and help."""
    for param in command.params:
        if isinstance(param, Option) and param.section is not Section.RECIPE:
            yield param


def _names(setting: Option) -> list[str]:
    """Its long names without hyphens before them, the one that is written first; `--no-verify` is `verify: false`."""
    return [name.removeprefix("--") for name in setting.opts if name.startswith("--")]


def _unknown(key: str, known: Mapping[str, Option], ctx: click.Context) -> str:
    """Why the key is none, without its value: it may be what nobody should see."""
    from streamconv.checkpoint.strict_json import shown

    if key in _TOKENS:
        return (
            f"{key} has no place in a recipe, which others read; log in with `hf auth login`, or set HF_TOKEN"
        )
    root = ctx.find_root().command
    others = root.commands.values() if isinstance(root, click.Group) else ()
    for other in others:
        if isinstance(other, JobCommand) and any(key in _names(setting) for setting in _options(other)):
            return f"{key} is an option of {other.name}, not of {ctx.command.name}; leave it out"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{shown(key)} is no option of {ctx.command.name}; the nearest is {near[0]}"


def _checked(setting: Option, value: Value, where: str, ctx: click.Context) -> Any:
    """The value for click, of the type the option has. Raises OptionError."""
    if setting.multiple:
        items = value if isinstance(value, list) else [value]
        if isinstance(setting.type, type(click.FLOAT)):
            if not all(type(item) in (int, float) for item in items):
                raise OptionError(f"{where} must be a number or a list of numbers")
            return tuple(items)
        if not all(isinstance(item, str) for item in items):
            raise OptionError(f"{where} must be text or a list of texts; put quotes around what is not")
        return tuple(str(item) for item in items)
    wanted, types = _type(setting)
    if type(value) not in types:
        hint = "; put it in quotes" if str in types and not isinstance(value, list) else ""
        raise OptionError(f"{where} must be {wanted}, found {_TYPE_NAMES[type(value)]}{hint}")
    if isinstance(setting.type, Size):
        value = str(value)  # so that 5 is no size here either
    try:
        setting.type_cast_value(ctx, value)
    except click.BadParameter as error:
        raise OptionError(f"{where}: {error.message.rstrip('.')}") from error
    return value


def _type(setting: Option) -> tuple[str, tuple[type, ...]]:
    """Types that its value may have, in words and in Python, where a bool is no int."""
    if setting.is_flag:
        return "true or false", (bool,)
    if isinstance(setting.type, Size):
        return "a size, such as 5GB", (str, int)
    if isinstance(setting.type, type(click.INT)):
        return "a whole number", (int,)
    if isinstance(setting.type, type(click.FLOAT)):
        return "a number", (int, float)
    return "text", (str,)


_TYPE_NAMES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}


def _resolved(command: click.Command, params: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Each option with its value, unless it has none; how a run is told of is not part of what it does."""
    for setting in _options(command):
        if setting.section is Section.MESSAGES or params[setting.name] is None:
            continue
        value = params[setting.name]
        if isinstance(setting.type, Size):
            value = exact_size(value)
        yield _names(setting)[0], list(value) if isinstance(value, tuple) else value


RECIPE = group(
    option(
        Section.RECIPE,
        "--recipe",
        type=click.Path(),
        metavar="FILE",
        multiple=True,
        is_eager=True,
        expose_value=False,
        callback=_load,
        help="Read options from a .json, .yaml or .yml file; those given here as well win.",
    ),
    option(
        Section.RECIPE,
        "--print-recipe",
        is_flag=True,
        help="Print all options as a recipe, and do nothing else.",
    ),
)
