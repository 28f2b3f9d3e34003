"""The command line: parse, call the library, show. Decides nothing.

What a command needs is imported inside it: torch takes seconds, and `--help` or a mistyped option should answer
at once.
"""

from __future__ import annotations

import click

from streamconv.cli.analysis import analyze_command
from streamconv.cli.comparison import compare_command
from streamconv.cli.completion import completion_command
from streamconv.cli.evaluation import eval_command
from streamconv.cli.exits import Commands
from streamconv.cli.extraction import extract_command
from streamconv.cli.jobs import convert_command, merge_command, plan_command
from streamconv.cli.listings import formats_command, inspect_command
from streamconv.cli.outputs import push_command, verify_command
from streamconv.cli.printing import answer


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version
        from platform import python_version

        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes", "safetensors"))
        answer(f"streamconv {version('streamconv')} (Python {python_version()}, {libraries})")
        ctx.exit()


@click.group(
    cls=Commands,
    commands=[
        merge_command,
        convert_command,
        plan_command,
        inspect_command,
        verify_command,
        analyze_command,
        eval_command,
        compare_command,
        extract_command,
        push_command,
        formats_command,
        completion_command,
    ],
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
    """Merge PEFT adapters, such as LoRA and QLoRA, into models of any size, and quantize the result.

    Weights stream from disk to disk in small tiles: memory does not grow with the model. Interrupted runs go on
    where they stopped when the same command is given again.

    Every option can be set in the environment, too, --max-ram as STREAMCONV_MAX_RAM; and in a file: --recipe.

    Exit codes: 0 done, 1 bug, 2 usage, 3 input, 4 output folder, 5 disk or memory, 6 network,
    7 verification or lost fine-tune, 129/130/143 stopped by a signal.
    """
