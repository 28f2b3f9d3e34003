"""Writes a file in order and in whole blocks, so that the bytes need not pass through the page cache."""

from __future__ import annotations

import errno
import os

from streamconv import disk

GATHERED_BYTES = 1 << 18
"""Bytes that are gathered before they are written, where they do not lie in memory as they will in the file."""


class BlockWriter:
    """A file of which all before `offset` is written; `plain` and `direct` are descriptors of it, the second ours.

    Where the system refuses to write directly after all, the first is used for both. After an error every call raises
    it again. Raises OSError. One writer belongs to one thread.
    """

    def __init__(self, plain: int, direct: int, offset: int) -> None:
        self._plain, self._direct, self._descriptor = plain, direct, direct
        self._gathered = disk.blocks(GATHERED_BYTES)
        self._filled = offset % disk.BLOCK  # of what is gathered, which belongs at `_start`
        self._start = offset - self._filled
        self._failure: OSError | None = None
        done = 0
        while done < self._filled:
            count = os.preadv(plain, [self._gathered[done : self._filled]], self._start + done)
            if not count:
                raise OSError(errno.EIO, "it was cut short")
            done += count

    def append(self, view: memoryview) -> None:
        """Write `view`, of bytes, or keep them until more of their block is there."""
        self._check()
        try:
            is_large = len(view) >= max(disk.BLOCK, GATHERED_BYTES // 4)
            if is_large and disk.is_direct(view, self._start + self._filled):
                view = self._write_in_place(view)
            while len(view):
                taken = min(len(view), GATHERED_BYTES - self._filled)
                self._gather(view[:taken])
                view = view[taken:]
                if self._filled == GATHERED_BYTES:
                    self._write_gathered()
        except OSError as error:
            self._failure = error
            raise

    def flush(self) -> None:
        """Write all that is kept; the part of the last block through the page cache."""
        self._check()
        try:
            self._write_gathered()
            self._write(self._plain, self._gathered[: self._filled], self._start)
        except OSError as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Close the descriptor for direct writing. Raises OSError."""
        direct, self._direct = self._direct, -1
        if direct >= 0:
            os.close(direct)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write_in_place(self, view: memoryview) -> memoryview:
        """Write whole blocks from where they lie; return what is left."""
        head = -self._filled % disk.BLOCK
        self._gather(view[:head])
        self._write_gathered()
        whole = (len(view) - head) // disk.BLOCK * disk.BLOCK
        self._write(self._descriptor, view[head : head + whole], self._start)
        self._start += whole
        return view[head + whole :]

    def _gather(self, view: memoryview) -> None:
        self._gathered[self._filled : self._filled + len(view)] = view
        self._filled += len(view)

    def _write_gathered(self) -> None:
        """Write the whole blocks of what is gathered."""
        whole = self._filled // disk.BLOCK * disk.BLOCK
        self._write(self._descriptor, self._gathered[:whole], self._start)
        self._start += whole
        self._filled -= whole
        self._gathered[: self._filled] = self._gathered[whole : whole + self._filled]

    def _write(self, descriptor: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(descriptor, view[done:], offset + done)
            except OSError as error:
                # Also where the disk took a part that is no whole block.
                if descriptor == self._plain or error.errno not in disk.REFUSED:
                    raise
                self._descriptor = descriptor = self._plain
