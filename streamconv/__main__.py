"""The program: `streamconv`, or `python -m streamconv`."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType


def main() -> None:
    """Hear signals before the command line is imported, which takes a while, and run it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _end)
    from streamconv.cli import main as command_line

    command_line()


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
