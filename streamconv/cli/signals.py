"""Signals: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is gone, which `nohup` has ignored.

A run that can go on later is asked to stop; a command that has nothing to lose ends at once. The exit code is 128 and
the signal's number.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamconv.progress import StopRequest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The command shall end, after it has removed its temporary files."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A signal asks the run to stop at the next boundary; a second one ends it at once."""
    from streamconv.progress import StopRequest

    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.signal_number is not None:
            os._exit(128 + number)
        stop.signal_number = number
        _tell(b"\nstopping; everything finished is kept\n")

    with on_signals(ask):
        yield stop


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """A signal raises Interrupted, for what has temporary files to remove; a second one ends the process at once."""
    is_asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        del frame
        if is_asked:
            os._exit(128 + number)
        is_asked = True
        raise Interrupted(number)

    with on_signals(interrupt):
        yield


def leave(number: int, frame: FrameType | None) -> None:
    """End at once: nothing is half done, and huggingface_hub would first wait for all its threads."""
    del frame
    signal.signal(number, signal.SIG_IGN)  # impatience need not be told twice
    _tell(b"\nstopped; the same command goes on\n")
    os._exit(128 + number)


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python lets no other one say what signals do
        yield
        return
    heard = [number for number in _SIGNALS if number != signal.SIGHUP or not _is_ignored(number)]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _tell(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        os.write(2, line)
