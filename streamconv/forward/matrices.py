"""Matrices that a forward pass multiplies by, and which stored weight [out, in] each of them is.

Most are the weight of an nn.Linear. transformers 5 has the experts of a layer in one parameter, [expert, out, in] or
[expert, in, out], of which a pass takes one expert's matrix after another; a stored weight is some outputs of one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from streamconv.forward.names import Sources
from streamconv.forward.skeleton import Skeleton
from streamconv.forward.walk import Walk, assign

Note = Callable[[str, Tensor], None]
NoteOutput = Callable[[str, Tensor, slice], None]


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """Place of a stored weight [out, in]: all of `parameter`, or of its expert number `expert` the outputs `outputs`.

    `is_in_out`: the parameter's matrices are [in, out]. `is_linear`: it is the weight of an nn.Linear, whole.
    """

    parameter: str
    is_linear: bool
    expert: int | None = None
    outputs: range = range(0)
    is_in_out: bool = False


class WeightMatrix(Protocol):
    """A stored weight [out, in] where a forward pass uses it, with its values in memory."""

    @property
    def parameter(self) -> str:
        """Name of the parameter that it is, or is part of."""

    @property
    def expert(self) -> int | None:
        """Number of the expert whose it is, to whom not all tokens come; None for one that they all come to."""

    @property
    def linear(self) -> nn.Module | None:
        """The nn.Linear that has it as its weight."""

    @property
    def factor(self) -> Tensor:
        """The matrix that a pass multiplies by, of which it is all or some outputs."""

    @property
    def outputs(self) -> slice:
        """Those of `factor` that are its own."""

    @property
    def inputs(self) -> int:
        """Number of its inputs."""

    @property
    def values(self) -> Tensor:
        """Its values, [out, in], in the memory in which a pass finds them."""

    def read(self) -> Tensor:
        """Its values, [out, in], which stay whatever is written."""

    def write(self, values: Tensor) -> None:
        """Have `values` [out, in] in its place from here on."""


Matrices = Mapping[str, WeightMatrix]
"""By name of the stored weight."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnParameter:
    """All of the parameter `weight` of a module; `linear` is that if it is an nn.Linear."""

    parameter: str
    module: nn.Module
    linear: nn.Module | None
    expert: None = None

    @property
    def factor(self) -> Tensor:
        found: Tensor = self.module.get_parameter("weight").data
        return found

    @property
    def outputs(self) -> slice:
        return slice(None)

    @property
    def inputs(self) -> int:
        return int(self.factor.shape[-1])

    @property
    def values(self) -> Tensor:
        return self.factor

    def read(self) -> Tensor:
        """See WeightMatrix."""
        return self.factor

    def write(self, values: Tensor) -> None:
        """See WeightMatrix."""
        assign(self.module, "weight", values)


@dataclass(frozen=True, slots=True, eq=False)
class OfExpert:
    """Outputs of one expert in the parameter of all, `name` in `module`."""

    module: nn.Module
    name: str
    place: MatrixPlace
    linear: None = None

    @property
    def parameter(self) -> str:
        return self.place.parameter

    @property
    def expert(self) -> int | None:
        return self.place.expert

    @property
    def factor(self) -> Tensor:
        values: Tensor = self.module.get_parameter(self.name).data
        return values[self.place.expert]

    @property
    def outputs(self) -> slice:
        return slice(self.place.outputs.start, self.place.outputs.stop, self.place.outputs.step)

    @property
    def inputs(self) -> int:
        return int(self.factor.shape[0 if self.place.is_in_out else 1])

    @property
    def values(self) -> Tensor:
        return self.factor[:, self.outputs].T if self.place.is_in_out else self.factor[self.outputs]

    def read(self) -> Tensor:
        """See WeightMatrix."""
        return self.values.clone(memory_format=torch.contiguous_format)

    def write(self, values: Tensor) -> None:
        """See WeightMatrix."""
        self.values.copy_(values)


# -- where they are ------------------------------------------------------------------------------------------------


def find_places(skeleton: Skeleton, sources: Iterable[Sources]) -> Mapping[str, MatrixPlace]:
    """Places of those stored weights of `sources` that a pass may multiply by, by name."""
    found: dict[str, MatrixPlace] = {}
    for each in sources:
        if each.converter is not None:
            found |= _places_of_experts(skeleton, each)
            continue
        module, _, last = each.parameter.rpartition(".")
        if last == "weight" and len(skeleton.stored[each.parameter].shape) == 2:
            is_linear = isinstance(skeleton.module(module), nn.Linear)
            found[each.weights[0][0]] = MatrixPlace(each.parameter, is_linear)
    return found


def _places_of_experts(skeleton: Skeleton, sources: Sources) -> Mapping[str, MatrixPlace]:
    """Places of experts' weights that are stacked, those of several patterns one below the other."""
    assert sources.converter is not None
    patterns = sources.converter.source_patterns
    steps = [(type(each).__name__, getattr(each, "dim", None)) for each in sources.converter.operations]
    shape = skeleton.stored[sources.parameter].shape
    wanted = [("MergeModulelist", 0), *([("Concatenate", 1)] if len(patterns) > 1 else [])]
    if steps != wanted or len(shape) != 3 or shape[1] % len(patterns):
        return {}
    height, found = shape[1] // len(patterns), {}
    for number, pattern in enumerate(patterns):
        outputs = range(number * height, (number + 1) * height)
        names = [name for name, matched in sources.weights if matched == pattern]
        for expert, name in enumerate(names):
            found[name] = MatrixPlace(sources.parameter, False, expert, outputs)
    return found


def matrices_of(walk: Walk, number: int, wanted: Container[str]) -> Matrices:
    """Matrices of decoder layer `number` that are stored as `wanted` weights."""
    places = find_places(walk.skeleton, walk.sources_of(number))
    return {name: _matrix(walk.skeleton, place) for name, place in places.items() if name in wanted}


def _matrix(skeleton: Skeleton, place: MatrixPlace) -> WeightMatrix:
    path, _, last = place.parameter.rpartition(".")
    module = skeleton.module(path)
    if place.expert is not None:
        return OfExpert(module, last, place)
    return OwnParameter(place.parameter, module, module if place.is_linear else None)


def take_experts_in_turn(skeleton: Skeleton) -> None:
    """Have a model multiply by one expert's matrix after another, where it could by those of all at once."""
    if skeleton.model._can_set_experts_implementation():
        skeleton.model.set_experts_implementation("eager")


# -- what enters and leaves them -----------------------------------------------------------------------------------


@contextmanager
def listening(matrices: Matrices, note: Note) -> Iterator[None]:
    """`note` is called with the name of a weight and its input [..., in], before a pass multiplies by it."""
    with ExitStack() as stack:
        for name, module in _linears(matrices):

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                if arguments[0].numel():  # an expert may be called for no token
                    note(name, arguments[0])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        stack.enter_context(_watching(matrices, note, _look_away))
        yield


@contextmanager
def listening_after(matrices: Matrices, note: NoteOutput) -> Iterator[None]:
    """`note` is called with the name of a weight, a product that a pass has made, and its own outputs in that."""
    with ExitStack() as stack:
        for name, module in _linears(matrices):

            def hook(_: nn.Module, given: object, found: Tensor, name: str = name) -> None:
                del given
                if found.numel():
                    note(name, found, slice(None))

            stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(_watching(matrices, _look_away, note))
        yield


def _linears(matrices: Matrices) -> Iterator[tuple[str, nn.Module]]:
    for name, matrix in matrices.items():
        if matrix.linear is not None:
            yield name, matrix.linear


def _look_away(*seen: object) -> None:
    del seen


@contextmanager
def _watching(matrices: Matrices, before: Note, after: NoteOutput) -> Iterator[None]:
    """Watch products by matrices that no nn.Linear has."""
    watched = {name: matrix for name, matrix in matrices.items() if matrix.linear is None}
    if not watched:
        yield
        return
    with _Products(watched, before, after):
        yield


_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm"})


class _Products(TorchFunctionMode):
    """Tells of products by matrices, which it knows by where they lie in memory."""

    def __init__(self, matrices: Matrices, before: Note, after: NoteOutput) -> None:
        super().__init__()
        self._before, self._after = before, after
        self._by_place: dict[tuple[int, tuple[int, ...]], list[tuple[str, WeightMatrix]]] = {}
        for name, matrix in matrices.items():
            factor = matrix.factor
            self._by_place.setdefault((factor.data_ptr(), factor.shape), []).append((name, matrix))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See torch.overrides."""
        del types
        is_product = getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1
        products = self._products(args[0], args[1]) if is_product else []
        for name, _, given, _ in products:
            if given.numel():
                self._before(name, given)
        made = func(*args, **(kwargs or {}))
        for name, matrix, given, number in products:
            if given.numel():
                self._after(name, made if number is None else made[number], matrix.outputs)
        return made

    def _products(self, given: Tensor, factor: Tensor) -> list[tuple[str, WeightMatrix, Tensor, int | None]]:
        """Matrices that are in `factor`, with what is multiplied by each, and its number where there are several."""
        if factor.dim() != 3:
            found = self._by_place.get((factor.data_ptr(), factor.shape), ())
            return [(name, matrix, given, None) for name, matrix in found]
        several: list[tuple[str, WeightMatrix, Tensor, int | None]] = []
        for number in range(len(factor)):
            for name, matrix in self._by_place.get((factor[number].data_ptr(), factor.shape[1:]), ()):
                # Rows of tokens that do not come to an expert are 0 there.
                several.append((name, matrix, given[number][given[number].any(-1)], number))
        return several
