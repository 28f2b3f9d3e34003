"""One input tried: read, refused, or a defect, which is told with its cause."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import threading
import time
import warnings
from dataclasses import dataclass

from streamconv.errors import StreamconvError
from tools.fuzz.targets import Target

LIMIT_S = 5.0
"""Longest that an input may take, on a busy machine."""

LIMIT_MESSAGE = 2000
"""Longest that a refusal may be, in characters."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Outcome of an input: the exit code of its refusal, None where it was read; seconds that it took."""

    exit_code: int | None
    seconds: float


class Defect(Exception):  # noqa: N818  it is the target's, not an error of this tool
    """An input that ended with something else than success or a deliberate, short refusal in time."""


def try_input(target: Target, data: bytes) -> Trial:
    """Have the target read `data`. Raises Defect."""
    began, refusal = time.monotonic(), None
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(data)
    except StreamconvError as error:
        refusal = error
    except (Exception, SystemExit) as error:
        raise Defect(f"{type(error).__name__}: {str(error)[:500]}") from error
    seconds = time.monotonic() - began
    if refusal is not None and (refusal.exit_code < 2 or len(str(refusal)) > LIMIT_MESSAGE):
        raise Defect(f"a refusal of {len(str(refusal))} characters with exit code {refusal.exit_code}")
    if seconds > LIMIT_S:
        raise Defect(f"{seconds:.1f} s")
    return Trial(refusal.exit_code if refusal else None, seconds)


def check_clean() -> None:
    """Raise Defect if inputs have left threads or descriptors behind."""
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    if threads > 50 or descriptors > 200:
        raise Defect(f"{threads} threads and {descriptors} open files are left over")
