"""Groups of linear layers that share an input, found by running their decoder layer: names say nothing of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from streamconv.forward.matrices import Matrices, listening


class Enough(Exception):  # noqa: N818  unwinds a forward pass that has gone far enough
    pass


@dataclass(slots=True)
class Group:
    """Weights that are given the same input. `runs` is how often a forward pass calls each, at most.

    `experts`: name of the parameter that they are part of, with others to which other tokens come; None for weights to
    which all come.
    """

    names: list[str]
    runs: int = 1
    experts: str | None = None


Keep = Callable[[Group, Tensor], None]


@dataclass(slots=True)
class Recorder:
    """Notes, while a layer runs, which linear layers are called, in which order, and on which tensor."""

    groups: list[Group] = field(default_factory=list)
    _of: dict[str, Group] = field(default_factory=dict)

    def missing(self, matrices: Matrices) -> list[str]:
        """Those that were not called: experts that no token came to."""
        return [name for name in matrices if name not in self._of]

    @contextmanager
    def watching(self, matrices: Matrices, keep: Keep) -> Iterator[None]:
        """Watch one forward pass. `keep` is called with every group that runs, and its input."""
        # Held, so that no other tensor can come to lie in its place meanwhile.
        inputs: list[tuple[Tensor, Group]] = []
        runs: dict[str, int] = {}

        def note(name: str, given: Tensor) -> None:
            runs[name] = runs.get(name, 0) + 1
            group = self._of.get(name)
            if group is None:
                group = next((group for seen, group in inputs if _is_same(seen, given)), None)
                if group is None:
                    matrix = matrices[name]
                    group = Group([], experts=None if matrix.expert is None else matrix.parameter)
                    self.groups.append(group)
                group.names.append(name)
                self._of[name] = group
                inputs.append((given, group))
            group.runs = max(group.runs, runs[name])
            if name == group.names[0]:
                keep(group, given)

        with listening(matrices, note):
            yield


def in_stages(groups: Sequence[Group], size: Callable[[Group], int], most: int) -> Iterator[list[Group]]:
    """Groups in the order in which they run; those of one layer's experts, which none of them waits for, at once, as
    many as have a `size` of `most` in all.
    """
    stages: dict[object, list[Group]] = {}
    for group in groups:
        stages.setdefault(group.experts or id(group), []).append(group)
    for stage in stages.values():
        taken: list[Group] = []
        for group in stage:
            if taken and sum(map(size, (*taken, group))) > most:
                yield taken
                taken = []
            taken.append(group)
        yield taken


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, be it under two objects, or as rows where the other is of sequences."""
    if one is other:
        return True
    if one.data_ptr() != other.data_ptr() or one.numel() != other.numel() or one._version != other._version:
        return False
    is_rows = one.is_contiguous() and other.is_contiguous() and one.shape[-1:] == other.shape[-1:]
    return is_rows or (one.shape == other.shape and one.stride() == other.stride())
