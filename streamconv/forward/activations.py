"""Hidden states of all sequences between two layers: in memory while they fit, else in a file, which may stay."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from streamconv.checkpoint.own_files import read_error
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.recorded import open_recorded
from streamconv.checkpoint.writer import close_written, write_error
from streamconv.errors import OutputError, ResourceError, StreamconvError
from streamconv.sizes import format_size
from streamconv.storage.file_set import temporary_folder
from streamconv.storage.hashing import hash_range
from streamconv.storage.local import close_quietly
from streamconv.threads import Future, Pool


@contextmanager
def hold_activations(shape: tuple[int, ...], dtype: torch.dtype, budget: int) -> Iterator[Tensor]:
    """A tensor of `shape` in host memory; over `budget` bytes it is mapped from a file, which vanishes afterwards.

    The file lies where temporary files go (TMPDIR). Raises ResourceError where there is no room for it.
    """
    count = torch.Size(shape).numel()
    nbytes = count * dtype.itemsize
    if nbytes <= budget:
        yield torch.empty(shape, dtype=dtype)
        return
    with temporary_folder() as folder:
        path = folder / "activations"
        try:
            with path.open("wb") as file:
                # Reserved now: a mapped file that outgrows its disk would end the process with SIGBUS.
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise ResourceError(
                f"{folder}: {format_size(nbytes)} of activations do not fit there: {error.strerror}; free some disk, "
                "set TMPDIR to another place, give fewer --tokens, or more --max-ram"
            ) from error
        yield map_file(path, shape, dtype, shared=True)


def map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> Tensor:
    """The content of a file as a tensor; what is written to it goes there if it is `shared`. Raises ResourceError."""
    try:
        count = torch.Size(shape).numel()
        return torch.from_file(str(path), shared=shared, size=count, dtype=dtype).view(shape)
    except RuntimeError as error:
        raise ResourceError(
            f"{path} cannot be mapped into memory: {str(error).splitlines()[0]}; raise the limit on address space "
            "(ulimit -v), or free some memory"
        ) from error


class ActivationFile:
    """Hidden states [sequence, token, hidden], float32, in the file `path`; use as a context manager.

    They are read and written a batch at a time, so memory holds just that. The file stays, and what `sync` has seen
    survives a kill and a power cut. Every method raises ResourceError where the disk is full, else OutputError.

    Where `hashes`, all that is written in order is hashed in a thread of its own, read back from the page cache, while
    the next batch is computed.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], hashes: bool = False) -> None:
        self._path, self._shape, self._hashes = path, shape, hashes
        self._trail = Pool(1, "sha256")  # starts no thread before it is used
        self._sha256, self._hashed = hashlib.sha256(), -1
        self._hashing: list[Future[int]] = []
        self._descriptor = open_recorded(path, os.O_RDWR | os.O_CREAT)
        try:
            # Reserved now, so that a full disk shows before the work is done.
            os.posix_fallocate(self._descriptor, 0, max(1, self.nbytes))
        except OSError as error:
            close_quietly(self._descriptor)
            raise write_error(error, path, self.nbytes) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._trail.shutdown()
        close_written(self._descriptor, self._path)

    @property
    def nbytes(self) -> int:
        return 4 * torch.Size(self._shape).numel()

    def read(self, chosen: slice) -> Tensor:
        """The hidden states of some sequences, in memory of their own."""
        first, stop, _ = chosen.indices(self._shape[0])
        states = torch.empty(stop - first, *self._shape[1:])
        self._move(os.preadv, read_error, states, first)
        return states

    def write(self, chosen: slice, states: Tensor) -> None:
        """Put `states` in the place of some sequences."""
        first, _, _ = chosen.indices(self._shape[0])
        start, stop = self._move(os.pwritev, write_error, states.to("cpu", torch.float32).contiguous(), first)
        if self._hashes:
            self._hash_next(start, stop)

    def sync(self) -> str:
        """Bring all that was written to the disk; the SHA-256 of the file."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(error, self._path) from error
        try:
            self._wait()
            return self._sha256.hexdigest() if self._hashed == self.nbytes else self._hash_all()
        except OSError as error:
            raise read_error(error, self._path) from error

    def _hash_all(self) -> str:
        digest = hashlib.sha256()
        hash_range(digest, self._descriptor)
        return digest.hexdigest()

    def _hash_next(self, start: int, stop: int) -> None:
        """Have bytes that were just written hashed, if they are the first ones or follow those that were."""
        if start == 0:
            self._wait()
            self._sha256, self._hashed = hashlib.sha256(), 0
        if start != self._hashed:
            self._hashed = -1  # written in another order: all of it is hashed in the end
            return
        self._hashed = stop
        self._hashing.append(self._trail.submit(hash_range, self._sha256, self._descriptor, start, stop))

    def _wait(self) -> None:
        while self._hashing:
            self._hashing.pop(0).result()

    def _move(
        self,
        call: Callable[[int, list[memoryview], int], int],
        typed: Callable[[OSError, Path], StreamconvError],
        states: Tensor,
        first: int,
    ) -> tuple[int, int]:
        """Move all bytes of `states` from or to the sequences from `first` on; from where to where they lie."""
        view, start = tensor_bytes(states), first * self.nbytes // max(1, self._shape[0])
        done = 0
        while done < len(view):
            try:
                count = call(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise typed(error, self._path) from error
            if not count:
                raise OutputError(
                    f"{self._path} ended at byte {start + done} of {self.nbytes} while it was in use; run again"
                )
            done += count
        return start, start + done
