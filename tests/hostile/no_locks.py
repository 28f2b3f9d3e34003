"""Locks that hold nobody off, as between two hosts that mount a file system each with locks of its own.

For a fork server: importing this module is what takes the locks away, there and in all its children.
"""

from __future__ import annotations

import fcntl


def granted(descriptor: int, operation: int) -> None:
    """Grant every lock to everybody."""
    del descriptor, operation


vars(fcntl)["flock"] = granted
