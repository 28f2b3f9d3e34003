"""Hidden states of all sequences between two layers: in memory while they fit, else in a file, which may stay."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.writer import write_error
from streamconv.errors import ResourceError
from streamconv.sizes import format_size


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
    with tempfile.TemporaryDirectory(prefix="streamconv-") as folder:
        path = Path(folder) / "activations"
        try:
            with path.open("wb") as file:
                # Reserved now: a mapped file that outgrows its disk would end the process with SIGBUS.
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise ResourceError(
                f"{folder}: {format_size(nbytes)} of activations do not fit there: {error.strerror}; free some disk, "
                "set TMPDIR to another place, give fewer --tokens, or more --max-ram"
            ) from error
        yield torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


class ActivationFile:
    """Hidden states [sequence, token, hidden], float32, in the file `path`; use as a context manager.

    They are read and written a batch at a time, so memory holds just that. The file stays, and what `sync` has seen
    survives a kill and a power cut. Every method raises ResourceError where the disk is full, else OutputError.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self._shape = path, shape
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, path) from error
        try:
            # Reserved now, so that a full disk shows before the work is done.
            os.posix_fallocate(self._descriptor, 0, max(1, self.nbytes))
        except OSError as error:
            os.close(self._descriptor)
            raise write_error(error, path, self.nbytes) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)

    @property
    def nbytes(self) -> int:
        return 4 * torch.Size(self._shape).numel()

    def read(self, chosen: slice) -> Tensor:
        """The hidden states of some sequences, in memory of their own."""
        first, stop, _ = chosen.indices(self._shape[0])
        states = torch.empty(stop - first, *self._shape[1:])
        self._move(os.preadv, states, first)
        return states

    def write(self, chosen: slice, states: Tensor) -> None:
        """Put `states` in the place of some sequences."""
        first, _, _ = chosen.indices(self._shape[0])
        self._move(os.pwritev, states.to("cpu", torch.float32).contiguous(), first)

    def sync(self) -> None:
        """Bring all that was written to the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(error, self._path) from error

    def _move(self, call: Callable[[int, list[memoryview], int], int], states: Tensor, first: int) -> None:
        view, start = tensor_bytes(states), first * self.nbytes // max(1, self._shape[0])
        done = 0
        while done < len(view):
            try:
                count = call(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise write_error(error, self._path) from error
            assert count, f"{self._path} ended at byte {start + done}"
            done += count
