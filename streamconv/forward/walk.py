"""A walk through a model: every decoder layer in turn, over all sequences, before the next is read.

What surrounds the layers is the model's own code. Its `forward` is run with layers that only take notes: so come the
hidden states that enter the first layer, and the further arguments (masks, positions) that each layer is given. It is
run again with layers that hand in the hidden states of the last one: so come norm and head. Three things are checked on
the way, and a model that breaks one is refused by name: layers run in order, each on what the one before returned, and
their further arguments do not depend on the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.forward.names import Sources, find_sources
from streamconv.forward.skeleton import Skeleton
from streamconv.forward.weights import Weights
from streamconv.memory_errors import is_out_of_memory
from streamconv.planning.devices import Device
from streamconv.system_errors import lacking

Forward = Callable[[Tensor, "Call"], Any]
Visit = Callable[[int, Tensor], None]
Keep = Callable[[slice, Tensor], None]


def in_batches(windows: Tensor, batch: int) -> Sequence[slice]:
    """Sequences, `batch` at a time."""
    return [slice(first, first + batch) for first in range(0, len(windows), batch)]


def _look_away(number: int, states: Tensor) -> None:
    del number, states


class _Reached(Exception):  # noqa: N818  unwinds a forward pass that has gone far enough
    pass


@dataclass(frozen=True, slots=True)
class Call:
    """Call of a layer: its arguments beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def tensors(self) -> list[Tensor]:
        return [given for given in (*self.arguments, *self.keywords.values()) if isinstance(given, Tensor)]


@dataclass(frozen=True, slots=True)
class Passing:
    """Windows on their way through a model: what its layers are called with, by length of the batch."""

    walk: Walk
    calls: Mapping[int, Sequence[Call]]
    first: ExitStack

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Layer `number` with its weights, which go at the end. Layers are asked for in order, each once."""
        with self.walk.opened_layer(number, self.first) as layer:
            yield layer

    def through(self, layer: nn.Module, number: int, hidden: Tensor) -> Tensor:
        """Outputs of `layer`, whose number it is, for `hidden` [sequence, token, hidden], on the device."""
        device = self.walk.device.torch
        return self.walk.compute(layer, self.calls[len(hidden)][number], hidden.to(device))


class Walk:
    """One model, its weights, and where they are computed."""

    def __init__(self, skeleton: Skeleton, source: Weights, device: Device) -> None:
        self.skeleton, self.source, self.device = skeleton, source, device
        self._sources = find_sources(skeleton, source.names)
        self._layers = list(skeleton.layers.values())
        self._head = self._head_weight()
        self._check_complete()
        # Whether the model's layers return hidden states alone, or first in a tuple: known once one has run.
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden
        self._beside: Sequence[Tensor] = ()  # what a layer returns beside them, for nobody to use
        for module in skeleton.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device.torch)

    # -- what is known beforehand --------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        return self.source.shape(self._head)[0]

    @property
    def hidden(self) -> int:
        """Width of the hidden states; the embedding may have another, and a projection after it."""
        return int(self.skeleton.text_config.hidden_size)

    @property
    def _embedded(self) -> int:
        return int(self._embedding_module.embedding_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of hidden states."""
        return self._embedding_module.weight.dtype

    @property
    def _embedding_module(self) -> nn.Embedding:
        found = self.skeleton.module(self.skeleton.embedding)
        assert isinstance(found, nn.Embedding)
        return found

    @property
    def largest_layer_bytes(self) -> int:
        """The most that a layer takes while it is put together: its weights, and the parts of a fused one."""
        return max(self.layer_bytes(number) for number in range(len(self._layers)))

    def layer_weights(self, number: int) -> Sequence[str]:
        """Stored weights that layer `number` is made of."""
        path = list(self.skeleton.layers)[number]
        return sorted({weight for sources in self._under(path) for weight, _ in sources.weights})

    @property
    def head_bytes(self) -> int:
        """Bytes read for the head."""
        return self.source.stored_bytes(self._head)

    @property
    def bytes_of_a_pass(self) -> int:
        """Bytes read from the checkpoint in one pass."""
        names = {weight for number in range(len(self._layers)) for weight in self.layer_weights(number)}
        around = {self._sources[f"{self.skeleton.embedding}.weight"].weights[0][0]}
        return sum(self.source.stored_bytes(name) for name in names | around) + self.head_bytes

    def layer_bytes(self, number: int) -> int:
        """Bytes of a layer while it is put together."""
        path = list(self.skeleton.layers)[number]
        groups = [
            (sum(self.source.nbytes(weight) for weight, _ in sources.weights), sources.converter)
            for sources in self._under(path)
        ]
        return sum(size for size, _ in groups) + max((2 * size for size, how in groups if how), default=0)

    def _under(self, path: str) -> list[Sources]:
        return [sources for name, sources in self._sources.items() if name.startswith(f"{path}.")]

    def sources_of(self, number: int) -> Sequence[Sources]:
        """Sources of every parameter of layer `number`."""
        return self._under(list(self.skeleton.layers)[number])

    def _head_weight(self) -> str:
        """The stored weight of the head: its own, or the embedding's where the two are tied."""
        name = f"{self.skeleton.head}.weight"
        levels = (self.skeleton.model.config, self.skeleton.text_config)
        if name not in self._sources and any(
            getattr(level, "tie_word_embeddings", False) for level in levels
        ):
            name = f"{self.skeleton.embedding}.weight"
        return self._one_weight(name)

    def _one_weight(self, parameter: str) -> str:
        sources = self._sources.get(parameter)
        if sources is None:
            raise self._missing(parameter)
        if sources.converter is not None:
            raise UnsupportedError(
                f"{self.skeleton.location}: {self.skeleton.name} cannot be run layer by layer: {parameter} is "
                "stored in parts"
            )
        return sources.weights[0][0]

    def _check_complete(self) -> None:
        self._one_weight(f"{self.skeleton.embedding}.weight")
        made_elsewhere = {
            target
            for sources in self._sources.values()
            if sources.converter is not None and len(sources.converter.target_patterns) > 1
            for target in sources.converter.target_patterns
        }
        for path in self.skeleton.layers:
            for name in self.skeleton.stored:
                is_made = any(re.search(re.escape(target), name) for target in made_elsewhere)
                if name.startswith(f"{path}.") and name not in self._sources and not is_made:
                    raise self._missing(name)

    def _missing(self, parameter: str) -> CheckpointError:
        return CheckpointError(
            f"{self.skeleton.location}: no weight is stored for {parameter} of {self.skeleton.name}; the checkpoint "
            "is not complete, or not of this model"
        )

    # -- the walk --------------------------------------------------------------------------------------------

    def run(self, windows: Tensor, states: Tensor, batch: int, visit: Visit = _look_away) -> None:
        """Fill `states` [sequence, token, hidden] with what the last layer returns for `windows` [sequence, token].

        `batch` sequences are computed at a time. `visit` is called after each layer with its number and the states.
        """
        batches = in_batches(windows, batch)

        def keep(chosen: slice, entering: Tensor) -> None:
            states[chosen].copy_(entering)

        with self.entered(windows, batches, keep) as passing:
            for number in range(len(self._layers)):
                with passing.layer(number) as layer:
                    for chosen in batches:
                        states[chosen].copy_(passing.through(layer, number, states[chosen]))
                visit(number, states)

    @contextmanager
    def entered(self, windows: Tensor, batches: Sequence[slice], keep: Keep) -> Iterator[Passing]:
        """The passage of `windows` [sequence, token] through the layers, a batch at a time.

        `keep` is called with each batch and the hidden states [sequence, token, hidden] that enter the first layer.
        """
        with ExitStack() as stack:
            stack.enter_context(self._loading_others())
            first = stack.enter_context(ExitStack())
            layer = first.enter_context(self.materialized(0))
            # Not over the yield: of two walks that end in the order in which they began, the second would restore the
            # mode that it found, which is the first one's.
            with torch.no_grad(), self._embedding(windows):
                self._learn_to_wrap(windows[batches[0]], layer)
                calls = self._enter(windows, batches, keep)
            yield Passing(self, calls, first)

    @contextmanager
    def opened_layer(self, number: int, first: ExitStack) -> Iterator[nn.Module]:
        """Layer `number` with its weights; those of layer 0 are there until `first` is closed."""
        if number:
            first.close()
        with self.materialized(number) if number else first:
            yield self._layers[number]

    def compute(self, layer: nn.Module, call: Call, hidden: Tensor) -> Tensor:
        """Outputs of `layer` for hidden states on the device; there is a graph where `hidden` requires a gradient."""
        with self._telling(), torch.set_grad_enabled(hidden.requires_grad):
            returned = layer(hidden, *call.arguments, **call.keywords)
        found: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return found

    def plain_weights(self, number: int) -> Mapping[str, str]:
        """Parameters of a layer that are stored just as they are, with the weight that each is; both by full name."""
        path = list(self.skeleton.layers)[number]
        return {
            sources.parameter: sources.weights[0][0]
            for sources in self._under(path)
            if sources.converter is None
        }

    def logits(
        self, windows: Tensor, states: Tensor, batch: int, height: int
    ) -> Iterator[tuple[range, slice, Tensor]]:
        """The head's answers, `height` rows of the vocabulary at a time, and for these a batch at a time.

        Yields rows, sequences, and logits [sequence, token, row]. The head's weight is read once.
        """
        for rows in self.head_tiles(height):
            for chosen in in_batches(windows, batch):
                with torch.no_grad():  # not over the yield, as in `entered`
                    found = self.leave(windows[chosen], states[chosen])
                yield rows, chosen, found

    def head_tiles(self, height: int) -> Iterator[range]:
        """Rows of the vocabulary, about `height` at a time, while the head has just these. Its weight is read once."""
        head = self.skeleton.module(self.skeleton.head)
        bias = None
        if head.bias is not None:
            bias = self.source.read(self._one_weight(f"{self.skeleton.head}.bias"))
        with ExitStack() as stack:
            stack.enter_context(self._loading_others())
            stack.enter_context(self._restored(head))
            for rows, tile in self.source.tiles(self._head, height):
                assign(head, "weight", tile)
                if bias is not None:
                    assign(head, "bias", bias[rows.start : rows.stop])
                yield rows

    # -- around the layers -----------------------------------------------------------------------------------

    def _learn_to_wrap(self, windows: Tensor, layer: nn.Module) -> None:
        """See what a layer returns, on a few tokens: the model's own forward takes it apart."""
        seen: list[tuple[Tensor, Call]] = []

        def stop(hidden: Tensor, call: Call) -> Any:
            seen.append((hidden, call))
            raise _Reached

        self._forward(windows[:1, :8], [stop] * len(self._layers))
        hidden, call = seen[0]
        if hidden.shape != (1, min(8, windows.shape[1]), self.hidden):
            raise self._unwalkable(f"its hidden states have the shape {list(hidden.shape)}")
        with self._telling():
            returned = layer(hidden, *call.arguments, **call.keywords)
        if isinstance(returned, tuple):
            beside = returned[1:]
            self._beside = [item for item in beside if isinstance(item, Tensor)]
            self._wrap = lambda hidden: (hidden, *beside)

    def _enter(self, windows: Tensor, batches: Sequence[slice], keep: Keep) -> Mapping[int, Sequence[Call]]:
        """Have what enters the first layer kept; return what each is called with, by length of the batch."""
        known: dict[int, Sequence[Call]] = {}
        for batch in batches:
            entering, calls = self._record(windows[batch])
            keep(batch, entering)
            earlier = known.setdefault(len(windows[batch]), calls)
            if earlier is not calls and not _equal(earlier, calls, set()):
                raise self._unwalkable("what its layers are given beside hidden states depends on the text")
        return known

    def _record(self, windows: Tensor) -> tuple[Tensor, Sequence[Call]]:
        """The hidden states that enter the first layer, and the call of every layer."""
        calls: list[Call] = []
        entering: list[Tensor] = []

        def recorder(number: int) -> Forward:
            def record(hidden: Tensor, call: Call) -> Any:
                if len(calls) != number:
                    raise self._unwalkable("its layers do not run in order, each once")
                if entering and not (hidden is entering[0] or torch.equal(hidden, entering[0])):
                    raise self._unwalkable("it changes hidden states between its layers")
                if any(given is one for given in call.tensors() for one in self._beside):
                    raise self._unwalkable("its layers hand on more than hidden states")
                entering.append(hidden)
                calls.append(call)
                if number + 1 == len(self._layers):
                    raise _Reached
                return self._wrap(hidden)

            return record

        self._forward(windows, [recorder(number) for number in range(len(self._layers))])
        return entering[0], calls

    def leave(self, windows: Tensor, states: Tensor) -> Tensor:
        """Outputs of the model for the last layer's hidden states."""
        last = states.to(self.device.torch)

        def skip(hidden: Tensor, call: Call) -> Any:
            del hidden, call
            return self._wrap(last)

        embedding = self.skeleton.module(self.skeleton.embedding)
        with _replaced(embedding, lambda ids: last.new_zeros(1).expand(*ids.shape, self._embedded)):
            found = self._forward(windows, [skip] * len(self._layers))
        if found is None:
            raise self._unwalkable("it did not come to its head")
        logits: Tensor = found.logits
        return logits

    def _forward(self, windows: Tensor, layers: Sequence[Forward]) -> Any:
        """The model's forward with other layers; None where one of these had seen enough."""
        with ExitStack() as stack:
            for layer, forward in zip(self._layers, layers, strict=True):
                stack.enter_context(_replaced(layer, forward))
                hook = layer.register_forward_pre_hook(self._take_apart, with_kwargs=True)
                stack.callback(hook.remove)
            try:
                with self._telling():
                    return self.skeleton.model(input_ids=windows.to(self.device.torch), use_cache=False)
            except _Reached:
                return None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn errors of the model's own code into that of a model that cannot be walked."""
        try:
            yield
        except torch.AcceleratorError:  # the device failed, whatever the code
            raise
        # What torch and a model's code raise where shapes, arguments or operations do not fit.
        except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise lacking(error) or self._unwalkable(
                f"its own code fails: {(str(error).splitlines() or ['?'])[0]}"
            ) from error

    def _take_apart(
        self, _: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, Call], dict[str, Any]]:
        """Arguments of a layer's call, as those of the function in its place."""
        rest = dict(keywords)
        hidden = arguments[0] if arguments else rest.pop("hidden_states", None)
        if not isinstance(hidden, Tensor):
            raise self._unwalkable("its layers are not given hidden states first")
        return (hidden, Call(arguments[1:], rest)), {}

    def _unwalkable(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.skeleton.location}: {self.skeleton.name} cannot be run layer by layer: {reason}"
        )

    # -- weights in and out ------------------------------------------------------------------------------------

    @contextmanager
    def materialized(self, number: int) -> Iterator[nn.Module]:
        path = list(self.skeleton.layers)[number]
        layer = self._layers[number]
        with ExitStack() as stack:
            for module in layer.modules():
                stack.enter_context(self._restored(module))
            with _one_thread_each():
                for sources in self._under(path):
                    for name, value in sources.make(self.skeleton, self.source.read).items():
                        self._place(name, value)
            missing = [name for name, value in layer.state_dict().items() if value.is_meta]
            if missing:
                raise self._missing(f"{path}.{missing[0]}")
            yield layer

    def _place(self, name: str, value: Tensor) -> None:
        wanted = self.skeleton.stored.get(name)
        if wanted is None or wanted.shape != value.shape:
            raise CheckpointError(
                f"{self.skeleton.location}: {name} has shape {list(value.shape)}, and {self.skeleton.name} expects "
                f"{None if wanted is None else list(wanted.shape)}; config.json and weights are not of one model"
            )
        module, _, parameter = name.rpartition(".")
        assign(self.skeleton.module(module), parameter, value.to(wanted.dtype))

    @contextmanager
    def _embedding(self, windows: Tensor) -> Iterator[None]:
        """The embedding with just the rows that the text uses, and tokens numbered accordingly."""
        embedding = self._embedding_module
        name = self._one_weight(f"{self.skeleton.embedding}.weight")
        tokens = torch.unique(windows)  # sorted
        if int(tokens[-1]) >= self.source.shape(name)[0]:
            raise InputError(
                f"the tokenizer gives token {int(tokens[-1])}, and {self.skeleton.location} has an embedding of "
                f"{self.source.shape(name)[0]} rows; they are not of one model"
            )
        table = torch.empty(len(tokens), self._embedded, dtype=self.dtype, device=self.device.torch)
        for rows, tile in self.source.tiles(name, _TILE_ROWS):
            places = ((tokens >= rows.start) & (tokens < rows.stop)).nonzero().view(-1)
            table[places] = tile[tokens[places] - rows.start].to(table.dtype)
        numbers = tokens.to(self.device.torch)

        def renumber(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (torch.searchsorted(numbers, arguments[0]), *arguments[1:])

        padding, embedding.padding_idx = embedding.padding_idx, None
        hook = embedding.register_forward_pre_hook(renumber)
        with self._restored(embedding):
            assign(embedding, "weight", table)
            try:
                yield
            finally:
                hook.remove()
                embedding.padding_idx = padding

    @contextmanager
    def _loading_others(self) -> Iterator[None]:
        """Norms and the like get their weights when they first run, and keep them until this ends."""
        with ExitStack() as stack:
            for path, module in self.skeleton.others():
                stack.enter_context(self._restored(module))
                hook = module.register_forward_pre_hook(self._loader(path))
                stack.callback(hook.remove)
            yield

    def _loader(self, path: str) -> Callable[[nn.Module, Any], None]:
        def load(module: nn.Module, arguments: Any) -> None:
            del arguments
            own = [*module._parameters.items(), *module._buffers.items()]
            for name, value in own:
                full = f"{path}.{name}" if path else name
                if value is not None and full in self.skeleton.stored and full not in loaded:
                    loaded.add(full)
                    if full not in self._sources:
                        raise self._missing(full)
                    for made, tensor in self._sources[full].make(self.skeleton, self.source.read).items():
                        self._place(made, tensor)

        loaded: set[str] = set()
        return load

    @staticmethod
    @contextmanager
    def _restored(module: nn.Module) -> Iterator[None]:
        """Release what is assigned to the module inside, at the end."""
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        try:
            yield
        finally:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


_TILE_ROWS = 4096


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Have `value` be the parameter or buffer `name` of `module`."""
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another forward, which stands before that of its class."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Cells are shared between workers of one thread each, as when merging."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _equal(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    """Whether two calls are alike in every tensor; those that many layers share are compared once."""
    if one is other or (id(one), id(other)) in seen:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        seen.add((id(one), id(other)))
        return one.shape == other.shape and torch.equal(one, other)
    match one, other:
        case Call(arguments, keywords), Call(others, other_keywords):
            return _equal(arguments, others, seen) and _equal(keywords, other_keywords, seen)
        case dict(), dict():
            return one.keys() == other.keys() and all(_equal(one[key], other[key], seen) for key in one)
        case ((tuple() | list()), (tuple() | list())):
            return len(one) == len(other) and all(
                _equal(left, right, seen) for left, right in zip(one, other, strict=True)
            )
        case _:
            return type(one) is type(other) and (one == other or not _is_plain(one))


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
