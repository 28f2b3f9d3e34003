"""Exits of the program: every deliberate error becomes one line and its exit code."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from streamconv.cli.printing import printable, say
from streamconv.errors import Stopped, StreamconvError

_DEBUG = "streamconv.debug"


class Commands(click.Group):
    """Lists commands as they are defined; turns every deliberate error into one line and its exit code."""

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
            say(f"{prefix}{printable(str(error))}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            say("Interrupted.", err=True)
            sys.exit(128 + signal.SIGINT)


def set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    ctx.meta[_DEBUG] = value
