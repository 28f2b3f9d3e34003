"""Inputs of a layer's groups in the reference stream, in files: read, they need not be computed again.

On a CPU that is the faster way, by far; a GPU computes them in less time than a disk takes.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from torch import Tensor

from streamconv.calibration.groups import Group, Keep
from streamconv.checkpoint.writer import remove_file
from streamconv.forward.activations import ActivationFile


class KeptInputs:
    """Files in `folder`, one for each group whose inputs are all tokens [sequence, token], once each.

    A context manager, at whose end they are gone. `keeps` False: nothing is kept.
    """

    def __init__(self, folder: Path, sequences: int, length: int, keeps: bool) -> None:
        self._folder, self._sequences, self._length, self._keeps = folder, sequences, length, keeps
        self._files: dict[int, ActivationFile] = {}
        self._seen: dict[int, int] = {}  # sequences of which the input is there, by group
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def keeping(self, chosen: slice) -> Keep:
        """Callback that writes down the inputs of some sequences, for a forward pass to call by group."""
        first, stop, _ = chosen.indices(self._sequences)

        def keep(group: Group, given: Tensor) -> None:
            columns = given.shape[-1]
            is_whole = group.experts is None and given.numel() == (stop - first) * self._length * columns
            if self._keeps and is_whole:
                self._file(group, columns).write(chosen, given.reshape(stop - first, self._length, columns))
                self._seen[id(group)] = self._seen.get(id(group), 0) + stop - first

        return keep

    def read(self, group: Group, chosen: slice) -> Tensor | None:
        """The input of a group for some sequences [sequence, token, in]; None where not all of it was kept."""
        if self._seen.get(id(group)) != self._sequences or group.runs > 1:
            return None
        return self._files[id(group)].read(chosen)

    def _file(self, group: Group, columns: int) -> ActivationFile:
        if id(group) not in self._files:
            path = self._folder / f"inputs-{len(self._files)}"
            remove_file(path)  # of a run that was killed
            self._stack.callback(remove_file, path)
            file = self._stack.enter_context(ActivationFile(path, (self._sequences, self._length, columns)))
            self._files[id(group)] = file
        return self._files[id(group)]
