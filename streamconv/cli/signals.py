"""Signals, Ctrl-C and SIGTERM, while something runs that can go on later."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamconv.progress import StopRequest


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM ask the run to stop at the next boundary; a second one ends it at once."""
    from streamconv.progress import StopRequest

    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.signal_number is not None:
            os._exit(128 + number)
        stop.signal_number = number
        os.write(2, b"\nstopping; everything finished is kept\n")

    with on_signals(ask):
        yield stop


def leave(number: int, frame: FrameType | None) -> None:
    """End an upload at once: huggingface_hub would first wait for all its threads, and there is nothing to save."""
    del frame
    signal.signal(number, signal.SIG_IGN)  # impatience need not be told twice
    os.write(2, b"\nstopped; the same command goes on\n")
    os._exit(128 + number)


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)
