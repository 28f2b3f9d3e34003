"""Completion of commands, options and their values in a shell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem, get_completion_class

from streamconv.cli.blocks import Command
from streamconv.cli.format_rows import FormatRow, read_rows
from streamconv.cli.printing import answer

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

# Names that are looked up elsewhere, in modules that take time to import.
ROUNDING_NAMES = ("nearest", "stochastic", "adaptive", "search", "feedback")
TRAINED_ON = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
COMBINE_NAMES = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd")
_PROGRAM, _VARIABLE = "streamconv", "_STREAMCONV_COMPLETE"


def words(*first: str, rows: Callable[[FormatRow], bool] | None = None) -> Complete:
    """Completion by these words, and by the names of formats of which `rows` is true."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del ctx, param
        found = [CompletionItem(word) for word in first]
        if rows is not None:
            found += [CompletionItem(row.name, help=row.layout) for row in read_rows() if rows(row)]
        return [item for item in found if str(item.value).startswith(incomplete.lower())]

    return complete


def every(row: FormatRow) -> bool:
    """Whether it is a format."""
    return bool(row.name)


def has_codes(row: FormatRow) -> bool:
    """Whether weights are rounded to it."""
    return bool(row.roundings)


SHELLS: Sequence[str] = ("bash", "zsh", "fish")


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, options and their values, for a shell to read when it starts.

    \b
    streamconv completion bash > ~/.streamconv.bash  # and `source` it in ~/.bashrc
    streamconv completion zsh > ~/.streamconv.zsh  # and `source` it in ~/.zshrc
    streamconv completion fish > ~/.config/fish/completions/streamconv.fish
    """
    found = get_completion_class(shell)
    assert found is not None, f"click completes nothing in {shell}"
    root = click.get_current_context().find_root().command
    answer(*found(root, {}, _PROGRAM, _VARIABLE).source().strip().split("\n"))
