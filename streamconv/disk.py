"""Calls of the operating system beside reading and writing: each only makes files cheaper, and may be refused.

All that only some systems have is here, with its plain fallback. *Direct* reading and writing (O_DIRECT, Linux) moves
bytes between the disk and our memory without the page cache: measured 0.06 CPU-s/GB either way where a copy through the
cache took 0.3 to 0.6 (ext4 on a virtual disk). The system asks that offset, length and memory are whole blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import sys

import numpy as np

BLOCK = 4096
"""Bytes that offset, length and memory of a direct call are multiples of: a page, and no less than a disk's block."""

DIRECT_BYTES = 256 << 10
"""Bytes from which on direct reading is worth its calls."""

NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Errors of a file system that does not have a call."""

REFUSED = NOT_SUPPORTED | {errno.EFAULT}
"""Errors of a direct call where the same without it may succeed: EFAULT is that of memory which a device has mapped."""

_FICLONE = 0x40049409


def address(view: memoryview) -> int:
    """Address of the memory that `view`, of bytes and not empty, shows."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def place(memory: memoryview, offset: int, nbytes: int) -> int:
    """Start of the part of `memory` to and from which a file's `nbytes` bytes at `offset` can be moved directly.

    0, anywhere, where `memory` has no room to choose, or numbers of 8 bytes would lie across its own multiples of 8.
    """
    start = (offset - address(memory)) % BLOCK if nbytes else 0
    return start if start % 8 == 0 and start + nbytes <= len(memory) else 0


def is_direct(view: memoryview, offset: int) -> bool:
    """Whether `view` lies in memory as the file offset `offset` lies in its block."""
    return len(view) > 0 and (offset - address(view)) % BLOCK == 0


def blocks(nbytes: int) -> memoryview:
    """Writable memory of its own that begins with a block; taken from the system as it is first used."""
    return memoryview(mmap.mmap(-1, nbytes))


def open_direct(path: str | os.PathLike[str], descriptor: int, flags: int) -> int | None:
    """One more descriptor of the open file, for direct calls; None where `path` is another one by now, or none can be.

    `flags` are those of open(2).
    """
    if not hasattr(os, "O_DIRECT"):  # macOS
        return None
    try:
        opened = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if os.path.samestat(os.fstat(opened), os.fstat(descriptor)):
            return opened
    except OSError:
        pass
    with contextlib.suppress(OSError):
        os.close(opened)
    return None


def read_direct(descriptor: int, offset: int, view: memoryview) -> int:
    """Read into `view`, which `is_direct`, and return how many of its bytes are there: fewer at the end of the file.

    Blocks of which `view` has a part are read beside it. Raises OSError, also where the file system cannot do this.
    """
    before = offset % BLOCK
    head = min(-offset % BLOCK, len(view))
    middle = (len(view) - head) // BLOCK * BLOCK
    tail = len(view) - head - middle
    around = blocks(2 * BLOCK) if head or tail else memoryview(b"")
    parts = [around[:BLOCK]] * bool(head) + [view[head : head + middle]] * bool(middle)
    count = os.preadv(descriptor, parts + [around[BLOCK:]] * bool(tail), offset - (before if head else 0))
    if head:
        view[:head] = around[before : before + head]
        count -= before
    if tail:
        view[head + middle :] = around[BLOCK : BLOCK + tail]
    return max(0, min(count, len(view)))


def is_cached(descriptor: int, offset: int, nbytes: int) -> bool:
    """Whether most of a range of an open file is in memory, and cheaper to have from there: mincore(2).

    True where the system does not tell.
    """
    start = offset % mmap.ALLOCATIONGRANULARITY
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        with mmap.mmap(descriptor, start + nbytes, access=mmap.ACCESS_READ, offset=offset - start) as mapped:
            told = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            where = np.frombuffer(mapped, np.uint8)
            refused = libc.mincore(
                ctypes.c_void_p(where.ctypes.data),
                ctypes.c_size_t(len(mapped)),
                ctypes.c_void_p(told.ctypes.data),
            )
            del where  # or it could not be unmapped
    except (OSError, ValueError, AttributeError):
        return True
    return bool(refused) or 2 * int((told & 1).sum()) > len(told)


def advise(descriptor: int, offset: int, length: int, advice: str) -> None:
    """posix_fadvise `SEQUENTIAL` or `DONTNEED`. Advice only: macOS has none, file systems may refuse it."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, length, getattr(os, f"POSIX_FADV_{advice}"))


def allocate(descriptor: int, size: int) -> int:
    """Errno of fallocate(2) for the first `size` bytes: 0 when they are reserved, ENOSYS where it does not exist."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return errno.ENOSYS
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while libc.fallocate(descriptor, 0, 0, size):
        if ctypes.get_errno() != errno.EINTR:
            return ctypes.get_errno()
    return 0


def share_blocks(source: int, target: int) -> bool:
    """Whether the empty file `target` could be made to share all blocks of `source` (ioctl_ficlone(2))."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # another file system, or one that cannot
        return False
    return True


def sync_data(descriptor: int) -> None:
    """Bring a file's bytes to the disk, and what is needed to read them. Raises OSError."""
    getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has no fdatasync
