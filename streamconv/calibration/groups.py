"""Groups of linear layers that share an input, found by running their decoder layer: names say nothing of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

Linears = Mapping[str, nn.Linear]
"""The modules whose weights are calibrated, by name of the weight."""


class Enough(Exception):  # noqa: N818  unwinds a forward pass that has gone far enough
    pass


@dataclass(slots=True)
class Group:
    """Weights that are given the same input. `runs` is how often a forward pass calls each, at most."""

    names: list[str]
    runs: int = 1


Keep = Callable[[Group, Tensor], None]


@dataclass(slots=True)
class Recorder:
    """Notes, while a layer runs, which linear layers are called, in which order, and on which tensor."""

    groups: list[Group] = field(default_factory=list)
    _of: dict[str, Group] = field(default_factory=dict)

    def missing(self, linears: Linears) -> list[str]:
        """Those that were not called: experts that no token came to."""
        return [name for name in linears if name not in self._of]

    @contextmanager
    def watching(self, linears: Linears, keep: Keep) -> Iterator[None]:
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
                    group = Group([])
                    self.groups.append(group)
                group.names.append(name)
                self._of[name] = group
                inputs.append((given, group))
            group.runs = max(group.runs, runs[name])
            if name == group.names[0]:
                keep(group, given)

        with listening(linears, note):
            yield


@contextmanager
def listening(linears: Linears, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`note` is called with the name of a weight and the input of its linear layer, before that runs."""
    with ExitStack() as stack:
        for name, module in linears.items():

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                if arguments[0].numel():  # an expert may be called for no token
                    note(name, arguments[0])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, be it under two objects."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one._version == other._version
    )
