"""Exits of the program: every deliberate error becomes one line and its exit code."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from streamconv.cli.hiding import hidden, hide_credentials
from streamconv.errors import Stopped, StreamconvError

_DEBUG = "streamconv.debug"


class Commands(click.Group):
    """Lists commands as they are defined; turns every deliberate error into one line and its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        hide_credentials()
        try:
            return super().invoke(ctx)
        except StreamconvError as error:
            if ctx.meta.get(_DEBUG):
                raise
            prefix = "" if isinstance(error, Stopped) else "Error: "
            click.echo(f"{prefix}{_one_line(hidden(str(error)))}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(128 + signal.SIGINT)


def _one_line(message: str) -> str:
    """Names come from files that anyone may have written: none may break the line or steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)


def set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    ctx.meta[_DEBUG] = value
