"""Exits of the program: every deliberate error becomes one line and its exit code."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import click

from streamconv.cli.hiding import hidden, hide_credentials
from streamconv.cli.printing import safe_streams, say
from streamconv.cli.signals import Interrupted, leave, on_signals
from streamconv.errors import Stopped, StreamconvError
from streamconv.system_errors import translated

_DEBUG = "streamconv.debug"


class Commands(click.Group):
    """Lists commands as they are defined; turns every deliberate error into one line and its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line, whatever streams and signals come from outside."""
        # Where nothing else is said, nothing is written that a signal could leave half done: it ends the process.
        with safe_streams(), on_signals(leave):
            return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            with translated():
                return super().make_context(*args, **extra)
        except StreamconvError as error:  # of help, or of the version, that could not be printed
            _leave(error)

    def invoke(self, ctx: click.Context) -> Any:
        hide_credentials()
        try:
            with translated():
                return super().invoke(ctx)
        except StreamconvError as error:
            if ctx.meta.get(_DEBUG):
                raise
            _leave(error)
        except Interrupted as error:
            say("Interrupted.", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            say("Interrupted.", err=True)
            sys.exit(128 + signal.SIGINT)


def _leave(error: StreamconvError) -> NoReturn:
    prefix = "" if isinstance(error, Stopped) else "Error: "
    say(f"{prefix}{hidden(str(error))}", err=True)
    sys.exit(error.exit_code)


def set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    ctx.meta[_DEBUG] = value
