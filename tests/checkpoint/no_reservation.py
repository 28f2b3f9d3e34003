"""A C library on a file system that cannot reserve space, as NFSv3."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence


class Unsupported:
    """fallocate(2) that fails with EOPNOTSUPP."""

    argtypes: Sequence[object] = ()

    def __call__(self, *given: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1


class Library:
    """Stands for libc."""

    def __init__(self) -> None:
        self.fallocate = Unsupported()


def without_reservation(name: str | None = None, *, use_errno: bool = False) -> Library:
    """`ctypes.CDLL`."""
    assert name is None
    assert use_errno
    return Library()
