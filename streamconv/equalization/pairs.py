"""The pairs of one model, found by its config and the names and shapes of its weights; what does not fit is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.checkpoint.types import Shape
from streamconv.equalization import FAMILIES
from streamconv.equalization.base import Family, Heads, LayerForm, Outputs, Pair, Producer
from streamconv.equalization.equalizer import COLUMNS, ROWS, Equalizer
from streamconv.errors import UnsupportedError
from streamconv.formats.linear import module_of

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")


@dataclass(frozen=True, slots=True)
class WeightPair:
    """Weights by name: `producer`, with its `bias` if it has one, is divided by `scales` numbers, `consumers` are
    multiplied.

    `heads` [kv heads, query heads of each, width] says how a consumer's inputs are made of what is scaled: each number
    is that of `heads[1]` inputs. Without heads it is [1, 1, scales]. `divided` are those of the producer's `outputs`
    that are. `is_routed`: it is an expert's, to which not all tokens come.
    """

    producer: str
    bias: str | None
    consumers: tuple[str, ...]
    kind: Producer
    heads: tuple[int, int, int]
    divided: range
    outputs: int
    is_routed: bool = False

    @property
    def shift(self) -> float:
        return 1.0 if self.kind is Producer.NORM_OF_ONE_MORE else 0.0

    @property
    def is_norm(self) -> bool:
        return self.kind in (Producer.NORM, Producer.NORM_OF_ONE_MORE)

    @property
    def scales(self) -> int:
        return self.heads[0] * self.heads[2]

    @property
    def inputs(self) -> int:
        """Number of inputs that a consumer has."""
        return self.scales * self.heads[1]

    def gathered(self, values: Tensor) -> Tensor:
        """Mean of `values` [inputs], one for every input, over the inputs that share a scale: [scales]."""
        return values.view(self.heads).mean(1).flatten()

    def among_outputs(self, factors: Tensor) -> Tensor:
        """`factors` [scales] as all outputs are to have them, 1 where they are not divided: [outputs]."""
        whole = torch.ones(self.outputs, dtype=factors.dtype, device=factors.device)
        whole[self.divided.start : self.divided.stop] = factors
        return whole

    def spread(self, scales: Tensor) -> Tensor:
        """[scales] as every input is to have them: [inputs]."""
        outer, shared, width = self.heads
        return scales.view(outer, 1, width).expand(outer, shared, width).flatten()


@dataclass(frozen=True, slots=True)
class Equalization:
    """Pairs of a model that are equalized: `name` as `--rescale` has it, `family` as config.json."""

    name: str
    family: str
    pairs: tuple[WeightPair, ...]

    def equalizers(self, shapes: Mapping[str, Shape]) -> Mapping[str, Equalizer]:
        """Equalizers by weight, without their factors."""
        roles: dict[str, set[str]] = {}
        shifts: dict[str, float] = {}
        for pair in self.pairs:
            roles.setdefault(pair.producer, set()).add(COLUMNS if pair.is_norm else ROWS)
            shifts[pair.producer] = pair.shift
            if pair.bias is not None:
                roles[pair.bias] = {COLUMNS}
            for name in pair.consumers:
                roles.setdefault(name, set()).add(COLUMNS)
        return {
            name: Equalizer(name, shapes[name], tuple(sorted(found)), shifts.get(name, 0.0))
            for name, found in roles.items()
        }


def find_equalization(
    name: str,
    location: str,
    model_type: str,
    heads: Heads | None,
    shapes: Mapping[str, Shape],
    linears: Iterable[str],
    quantized: Collection[str],
) -> Equalization:
    """The pairs of a model whose weights have these `shapes`, as far as a consumer of them is `quantized`.

    `linears` are weights of linear layers in decoder layers, as a forward pass uses them. Raises UnsupportedError for a
    family that is not known, and for a layer that is not just what the family says.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedError(
            f"{location}: --rescale {name} does not know which weights of the model type {model_type!r} can be "
            f"rescaled together; it knows {', '.join(FAMILIES)}. Leave --rescale out"
        )
    found: list[WeightPair] = []
    for layer in dict.fromkeys(match[1] for name in sorted(linears) if (match := _LAYER.match(name))):
        inside = {key: shape for key, shape in shapes.items() if key.startswith(f"{layer}.")}
        form = _form_of(layer, inside, family)
        _check_known(layer, inside, form, model_type)
        found += _pairs_of(layer, inside, form, heads)
    wanted = tuple(pair for pair in found if any(name in quantized for name in pair.consumers))
    if not wanted:
        raise UnsupportedError(
            f"{location}: --rescale {name} has nothing to do: no weight in a decoder layer is quantized that reads "
            "what another can be divided for; leave it out"
        )
    return Equalization(name, model_type, wanted)


_NUMBER = re.compile(r"\bexperts\.(\d+)\.")


def _pattern(module: str) -> str:
    """The path of a module with `*` for the number of an expert."""
    return _NUMBER.sub("experts.*.", module)


def _form_of(layer: str, shapes: Mapping[str, Shape], family: Family) -> LayerForm:
    """The form of the family that a layer has, or comes nearest to."""
    modules = {_pattern(module_of(name.removeprefix(f"{layer}."))) for name in shapes}
    return min(family, key=lambda form: len(modules - form.modules))


def _check_known(layer: str, shapes: Mapping[str, Shape], form: LayerForm, model_type: str) -> None:
    """Raise UnsupportedError for a weight of a module that the form does not have: it might read what is divided."""
    norms = {pair.producer for pair in form.pairs if pair.kind not in (Producer.ROWS, Producer.VALUES)}
    for name in shapes:
        module, _, last = name.removeprefix(f"{layer}.").rpartition(".")
        if _pattern(module) not in form.modules or (last == "bias" and module in norms):
            raise UnsupportedError(
                f"{name} is no weight that the layers of a {model_type} have, so what reads what in this one is not "
                "known, and rescaling could change the model; leave --rescale out"
            )


def _pairs_of(
    layer: str, shapes: Mapping[str, Shape], form: LayerForm, heads: Heads | None
) -> Iterator[WeightPair]:
    experts = _numbers_of_experts(layer, shapes)
    for pair in form.pairs:
        for producer, consumers in _members(pair, experts):
            names = [f"{layer}.{module}.weight" for module in (producer, *consumers)]
            for name in names:
                if name not in shapes:
                    raise UnsupportedError(
                        f"{name} is missing, which is to be rescaled with {names[0]}; leave --rescale out"
                    )
            bias = f"{layer}.{producer}.bias"
            yield _weight_pair(pair, names, bias if bias in shapes else None, shapes, heads)


def _numbers_of_experts(layer: str, shapes: Mapping[str, Shape]) -> Sequence[int]:
    found = {int(match[1]) for name in shapes if (match := _NUMBER.search(name.removeprefix(layer)))}
    return sorted(found)


def _members(pair: Pair, experts: Sequence[int]) -> Iterator[tuple[str, Sequence[str]]]:
    """Producer and consumers with the numbers of experts: a pair for each, or all of them the consumers of one."""
    if "*" in pair.producer:
        for number in experts:
            yield (
                pair.producer.replace("*", str(number)),
                [each.replace("*", str(number)) for each in pair.consumers],
            )
        return
    consumers = []
    for each in pair.consumers:
        consumers += [each.replace("*", str(number)) for number in experts] if "*" in each else [each]
    yield pair.producer, consumers


def _weight_pair(
    pair: Pair,
    names: Sequence[str],
    bias: str | None,
    shapes: Mapping[str, Shape],
    heads: Heads | None,
) -> WeightPair:
    producer, *consumers = names
    outputs = shapes[producer][0]
    divided = range(outputs // 2 if pair.outputs is Outputs.SECOND_HALF else 0, outputs)
    if pair.outputs is Outputs.VALUES and heads is not None:
        divided = range(max(0, outputs - heads.keys * heads.width), outputs)
    shared = 1, 1, len(divided)
    if pair.kind is Producer.VALUES:
        shared = _shared(pair, producer, shapes[producer], consumers[0], shapes[consumers[0]], heads)
    is_routed = "*" in pair.producer
    found = WeightPair(producer, bias, tuple(consumers), pair.kind, shared, divided, outputs, is_routed)
    _check_shapes(found, shapes)
    return found


def _shared(
    pair: Pair, producer: str, shape: Shape, consumer: str, read: Shape, heads: Heads | None
) -> tuple[int, int, int]:
    """`heads` of a WeightPair. Raises UnsupportedError where the model's are not those of the weights."""
    where = f"{producer} is {list(shape)} and {consumer} {list(read)}"
    if heads is None:
        raise UnsupportedError(f"{where}, and config.json does not tell the heads; leave --rescale out")
    queries, keys, width = heads.queries, heads.keys, heads.width
    outputs = keys * width if pair.outputs is Outputs.ALL else (queries + 2 * keys) * width
    if queries % keys or shape[0] != outputs or read[-1] != queries * width:
        raise UnsupportedError(
            f"{where}, and config.json tells of {queries} heads that share the values of {keys}, {width} wide; which "
            "output meets which input is not known, leave --rescale out"
        )
    return keys, queries // keys, width


def _check_shapes(pair: WeightPair, shapes: Mapping[str, Shape]) -> None:
    for name in pair.consumers:
        if len(shapes[name]) != 2 or shapes[name][1] != pair.inputs:
            raise UnsupportedError(
                f"{name} is {list(shapes[name])}, and {pair.producer}, {list(shapes[pair.producer])}, gives it "
                f"{pair.inputs} inputs; they cannot be rescaled together, leave --rescale out"
            )


def stored_scales(pair: WeightPair, norm: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales that a `norm` (float32) is really divided by when what `scales` make of it is stored as `dtype`.

    These, old values over new ones, are what consumers have to be multiplied by. Where one is far off what was
    wanted, as for a value that rounds to 0, nothing is done to that channel: its scale is 1.
    """
    before = norm + pair.shift
    after = (before / scales - pair.shift).to(dtype).float() + pair.shift
    found = before / after
    share = found / scales
    return torch.where(share.isfinite() & (share > 0.5) & (share < 2.0), found, torch.ones_like(found))
