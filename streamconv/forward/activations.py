"""Hidden states of all sequences between two layers: in memory while they fit, else in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

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
