"""The bytes of stored tensors, by range.

`pread` into the caller's buffer, not a memory map: measured 4 times as fast from a cold cache, and a file cut
short while in use is an error here, where a mapped one would end the process with SIGBUS. Large ranges that are not in
the page cache come directly from the disk, where memory and file system allow it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Self

import torch

from streamconv import disk
from streamconv.checkpoint.readers import Readers
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import CheckpointError
from streamconv.storage.base import FileStatus, RangeReader, SourceFile
from streamconv.storage.local import (
    blaming,
    check_unchanged,
    close_quietly,
    open_file,
    read_exactly,
    reading,
    status_of,
)
from streamconv.system_errors import lacking

_PAGE = 4096
_CHUNK_BYTES = 4 * 2**20


class TensorReader:
    """Reads ranges of tensors; keeps at most `max_open` files open. One reader belongs to one thread."""

    def __init__(self, max_open: int = 32) -> None:
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()  # path -> descriptor, least recently used first
        self._direct: dict[
            str, int | None
        ] = {}  # path -> descriptor for direct reading, None where that failed
        self._readers = Readers()
        self._recent: set[str] = set()  # those that were read since they were last looked at
        self._used: dict[
            str, tuple[SourceFile, FileStatus]
        ] = {}  # path -> the file, its status when first opened
        self._remote: dict[str, RangeReader] = {}  # path -> a file that is read by requests

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._readers.__exit__()
        while self._open:
            self._close(next(iter(self._open)))
        while self._remote:
            self._remote.popitem()[1].close()

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on, at least cost where it is `placed`; by requests
        where the file is not here.

        Raises CheckpointError if the file cannot be read, was cut short, or is not the one planned with; OutputError if
        the run itself has made it.
        """
        view = flat_bytes(buffer)
        if start < 0 or start + len(view) > tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start} to {start + len(view)} of {tensor.nbytes}")
        remote = self._requests(tensor.file)
        if remote is not None:
            remote.read_into(tensor.offset + start, view)
            return
        where = f"{tensor.file.name}: tensor {tensor.name}"
        with blaming(tensor.file):
            descriptor, offset = self._descriptor(tensor.file), tensor.offset + start
            direct = self._direct_descriptor(tensor.file, descriptor, offset, view)

            def read(first: int, stop: int) -> None:
                done = (
                    first
                    if direct is None
                    else first + _read_directly(direct, offset + first, view[first:stop])
                )
                read_exactly(descriptor, offset + done, view[done:stop], where)

            self._readers.share(len(view), read)

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """The whole tensor in memory of its own, in its logical order: for small ones.

        A transposed one is a view of its bytes, so that it takes no more memory than any other.
        """
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self.read_into(tensor, 0, tensor_bytes(raw))
        if tensor.dtype.torch is torch.bool and bool((raw > 1).any()):
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is BOOL and has bytes other than 0 and 1"
            )
        values, order = raw.view(tensor.dtype.torch), tensor.order
        if order is not None:
            values = values.reshape(order.stored).permute(order.axes)
        return values.reshape(tensor.shape)

    def have_same_bytes(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two tensors are stored alike, byte for byte, whatever their shapes; read in chunks."""
        if one.nbytes != other.nbytes:
            return False
        buffers = [torch.empty(min(_CHUNK_BYTES, one.nbytes), dtype=torch.uint8) for _ in range(2)]
        for start in range(0, one.nbytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, one.nbytes - start)
            for tensor, buffer in zip((one, other), buffers, strict=True):
                self.read_into(tensor, start, tensor_bytes(buffer[:length]))
            if not buffers[0][:length].equal(buffers[1][:length]):
                return False
        return True

    def drop_cache(self, tensor: StoredTensor, start: int, length: int) -> None:
        """Let the kernel forget these bytes of the tensor: they will not be read again."""
        if self._requests(tensor.file) is not None:
            return
        offset = tensor.offset + start
        # Only whole pages are dropped; the page that the last range ended in is done with now.
        disk.advise(
            self._descriptor(tensor.file), offset - offset % _PAGE, offset % _PAGE + length, "DONTNEED"
        )

    def forget(self, file: SourceFile) -> None:
        """Close a file that will not be read again. Raises what `check_unchanged` does, of this one."""
        if file.path in self._used:
            self._check(file.path)
            del self._used[file.path]
        self._recent.discard(file.path)
        if file.path in self._open:
            self._close(file.path)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file that was read has been changed or replaced by now."""
        for path in self._used:
            self._check(path)

    def check_recent(self) -> None:
        """Raise CheckpointError as `check_unchanged` does, of the files that were read since this was last called.

        For whoever is about to record what was made of them: later changes come too late for that.
        """
        for path in self._recent:
            self._check(path)
        self._recent.clear()

    def _check(self, path: str) -> None:
        file, before = self._used[path]
        with blaming(file):
            self._compare(file, before)

    def _compare(self, file: SourceFile, before: FileStatus) -> None:
        path = file.path
        try:
            found = os.stat(path)  # noqa: PTH116  a path as text, straight to the kernel
        except OSError as error:
            told = CheckpointError(f"{file.name} vanished while it was in use: {error.strerror}")
            raise lacking(error) or told from error
        check_unchanged(file, found)
        if status_of(found).is_rewritten(before):
            raise CheckpointError(f"{file.name} was written to while it was in use; start again")

    def _requests(self, file: SourceFile) -> RangeReader | None:
        """A file that is not on this machine, to be read by requests; None for one that is."""
        if file.open_remote is None or file.path in self._open:
            return None
        if os.path.exists(file.path):  # noqa: PTH110  a path as text, straight to the kernel
            return None
        if file.path not in self._remote:
            self._remote[file.path] = file.open_remote()
        return self._remote[file.path]

    def _direct_descriptor(
        self, file: SourceFile, descriptor: int, offset: int, view: memoryview
    ) -> int | None:
        """A descriptor to read a range from the disk; None where it is better read, or can only be, as others are."""
        if len(view) < disk.DIRECT_BYTES or not disk.is_direct(view, offset):
            return None
        if file.path not in self._direct:
            self._direct[file.path] = disk.open_direct(file.path, descriptor, os.O_RDONLY)
        direct = self._direct[file.path]
        return None if direct is None or disk.is_cached(descriptor, offset, len(view)) else direct

    def _close(self, path: str) -> None:
        close_quietly(self._open.pop(path))
        direct = self._direct.pop(path, None)
        if direct is not None:
            close_quietly(direct)

    def _descriptor(self, file: SourceFile) -> int:
        self._recent.add(file.path)
        if file.path in self._open:
            self._open.move_to_end(file.path)
            return self._open[file.path]
        if len(self._open) >= self._max_open:
            self._close(next(iter(self._open)))
        descriptor = self._open[file.path] = open_file(file)
        with reading(file.name):
            self._used.setdefault(file.path, (file, status_of(os.fstat(descriptor))))
        disk.advise(descriptor, 0, 0, "SEQUENTIAL")
        return descriptor


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype: a view, no copy; writable like the tensor."""
    if not tensor.is_contiguous():
        raise ValueError("only the memory of a contiguous tensor is its bytes in order")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _read_directly(descriptor: int, offset: int, view: memoryview) -> int:
    """Bytes of `view` that could be read directly: what is missing, or wrong, shows when the rest is read."""
    try:
        return disk.read_direct(descriptor, offset, view)
    except OSError:
        return 0


def placed(memory: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """The part of `memory` (uint8, flat) to and from which a file's `nbytes` bytes at `offset` can be moved directly.

    For bytes that pass once: what is soon read again is cheaper to have in the page cache, and anywhere in memory.
    """
    start = disk.place(tensor_bytes(memory), offset, nbytes)
    return memory[start : start + nbytes]


def flat_bytes(buffer: memoryview) -> memoryview:
    """The same memory as a flat run of bytes. (`cast` alone refuses an empty view of two axes.)"""
    return buffer.cast("B") if buffer.nbytes else memoryview(b"")
