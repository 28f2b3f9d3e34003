"""Imported by a fork server whose runs speak with a stub of the Hub.

What they wait before they try again takes no time, and every library logs all that it has to say.
"""

from __future__ import annotations

import logging
import threading
import time

_sleep = time.sleep


def _nap(seconds: float) -> None:
    if seconds > threading.TIMEOUT_MAX:  # as the true one
        raise OverflowError("timestamp too large to convert to C _PyTime_t")
    _sleep(min(seconds, 0.002))


vars(time)["sleep"] = _nap
logging.basicConfig(level=logging.DEBUG)  # the HTTP library's headers, for one
