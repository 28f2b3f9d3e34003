"""The program: `streamconv`, or `python -m streamconv`."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import MutableMapping
from pathlib import Path
from types import FrameType

_NOWHERE = (
    b"Error: the folder in which this was started is not there any more; change to another one (cd), and run the same "
    b"command there\n"
)

COLLECT_AT = (100_000, 20, 100)
"""Thresholds of the garbage collector: by Python's own it looks through all that the imported libraries are made of
again and again while they are loaded, 0.2 to 0.3 s of a processor, and finds next to nothing.
"""


def main() -> None:
    """Hear signals before the command line is imported, which takes a while, and run it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _end)
    _check_folder()
    set_allocator(os.environ)
    gc.set_threshold(*COLLECT_AT)
    # Of cuBLAS, so that a product has the same bits each time; read once, when the first one is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from streamconv.cli import main as command_line

    command_line()


def _check_folder() -> None:
    """End with exit code 2 where the working directory was deleted: no path means anything then.

    Nor can torch be imported: its libraries would end the process with a message about themselves.
    """
    try:
        Path.cwd()
    except OSError:
        with contextlib.suppress(OSError):
            os.write(2, _NOWHERE)
        os._exit(2)


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Have torch's allocator on GPUs grow one piece of memory rather than keep many of sizes that come only once.

    So a layer's memory fits the next one's needs, too. What somebody has set themselves stays.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the same under its older name
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
