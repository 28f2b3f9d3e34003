"""Imported by a fork server: what its runs wait before they try again takes no time."""

from __future__ import annotations

import threading
import time

_sleep = time.sleep


def _nap(seconds: float) -> None:
    if seconds > threading.TIMEOUT_MAX:  # as the true one
        raise OverflowError("timestamp too large to convert to C _PyTime_t")
    _sleep(min(seconds, 0.002))


vars(time)["sleep"] = _nap
