"""Has the disk read the beginning of a local base while Python imports torch: two seconds in which it would be idle."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

# What a disk reads in that time; in the page cache, which gives it up when the memory is needed.
AHEAD_BYTES = 1 << 30


def read_ahead(base: str) -> None:
    """Ask for the first bytes of the shards in folder `base`, in a thread: the kernel may make it wait.

    A guess, which changes nothing but time: of a base that is elsewhere, or cannot be read, others will tell.
    """
    threading.Thread(target=_advise, args=(Path(base),), name="streamconv-readahead", daemon=True).start()


def _advise(folder: Path) -> None:
    left = AHEAD_BYTES
    with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS has no posix_fadvise
        for path in sorted(folder.glob("*.safetensors")):
            if left <= 0:
                return
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                length = min(left, os.fstat(descriptor).st_size)
                os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
            left -= length
