"""A GGUF base that stays the file that it is: what an update changes is stored anew in its place, all else is copied.

Headers are the base's to the byte, with all that they say of tokenizer, model and whoever made it, and so are the gaps
between tensors. Of what an update does not change, nothing is decoded, whatever its type.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from streamconv.adapters.base import Adapter, Update
from streamconv.checkpoint.container import StoredGguf
from streamconv.checkpoint.gguf import GgufFile
from streamconv.checkpoint.types import PADDING, Shard, StoredTensor, TensorSpec
from streamconv.dtypes import U8
from streamconv.equalization.equalizer import Equalizer
from streamconv.errors import UnsupportedError
from streamconv.formats import format_named
from streamconv.formats.base import Format, Weight
from streamconv.formats.gguf import PREFIX
from streamconv.formats.gguf_kept import file_format_name, in_place, type_named
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices, takes_calibration
from streamconv.planning.plan import Copy, ShardPlan, Step
from streamconv.planning.quantized import QuantizedSet
from streamconv.planning.steps import weight_steps
from streamconv.storage.base import SourceFile

_WAY = f"choose --quant none, or --quant {PREFIX}q4_k_m or another {PREFIX} format, which makes a new file"


def file_format(base: Base) -> str | None:
    """Name of the format by which a GGUF base is called: as its header has it, else by the type of most elements.

    None for other bases.
    """
    if not base.index.headers:
        return None
    elements = Counter[str]()
    for header in base.index.headers:
        for tensor in header.tensors.values():
            elements[tensor.dtype.code.lower()] += math.prod(tensor.shape)
    return file_format_name(base.index.pairs.get("general.file_type"), elements)


def stored_container(base: Base, quant: Format) -> StoredGguf:
    """Container of the base's own files, named after the format."""
    headers = tuple(header.raw for header in base.index.headers)
    return StoredGguf(quant.name.removeprefix(PREFIX).upper(), headers)


def kept_set(base: Base) -> QuantizedSet:
    """Types of all weights that are in blocks."""
    formats = {
        name: format_named(PREFIX + found)
        for name, weight in base.weights.items()
        if weight.is_quantized and (found := type_named(weight.format)) is not None
    }
    return QuantizedSet(formats, (), ())


def check_kept(base: Base, adapter: Adapter | None, weights: Mapping[str, Weight]) -> None:
    """Raise UnsupportedError where the output has tensors, or shapes, of which the base's header does not tell."""
    new = None
    if base.depth is not None:
        new = "repeats layers (layer_replication)"
    elif adapter is not None and adapter.head is not None:
        new = f"makes a {adapter.head.architecture} of the base"
    elif adapter is not None and adapter.untie:
        new = "gives the model an output head of its own"
    elif changed := _reshaped(base, weights):
        new = f"changes the vocabulary: {changed}"
    if new is not None:
        raise UnsupportedError(
            f"{base.index.storage.location}: the adapter {new}, and the file's header stays as it is; {_WAY}"
        )


def _reshaped(base: Base, weights: Mapping[str, Weight]) -> str | None:
    for name, weight in weights.items():
        before = base.weights[name].shape
        if weight.shape != before:
            return f"{name} has shape {list(weight.shape)} there and {list(before)} in the base"
    return None


def kept_steps(
    base: Base,
    weights: Mapping[str, Weight],
    updates: Mapping[str, tuple[Update, ...]],
    choices: Choices,
    within: frozenset[str],
    equalizers: Mapping[str, Equalizer],
) -> list[list[Step]]:
    """Steps of each file: of what is changed, rewrites in the type that it has; copies of all else, gaps included.

    `within` and `equalizers` as for `plan_steps`. Raises UnsupportedError for a change of what has a type that is only
    read.
    """
    changed = {name for name, weight in weights.items() if weight is not base.weights[name]}
    changed |= {*updates, *equalizers}
    places = _places(base)

    def rewritten(name: str, spec: TensorSpec) -> Sequence[Step]:
        stored = in_place(base.weights[name], spec)
        if stored is None:
            raise UnsupportedError(
                f"{base.index.storage.location}: the adapter changes {name}, whose type {spec.dtype.code} is read but"
                f" not written; {_WAY}"
            )
        on_grid, encoder = stored
        weight = on_grid if weights[name] is base.weights[name] else weights[name]
        calibrates = name in within and takes_calibration(encoder)
        return weight_steps(
            name, weight, updates.get(name, ()), encoder, None, choices.rest, calibrates, equalizers.get(name)
        )

    def steps_of(tensor: StoredTensor) -> Iterator[Step]:
        parts = places.get((tensor.file, tensor.name), [])
        if changed.isdisjoint(name for name, _ in parts):
            yield Copy(parts[0][0] if len(parts) == 1 else tensor.name, tensor, tensor.spec)
            return
        for name, part in parts:
            # Of those that are stacked, each has its place along the first axis.
            shape = tensor.shape if part.shape == tensor.shape else (1, *part.shape)
            spec = TensorSpec(tensor.name, tensor.dtype, shape)
            if name in changed:
                yield from rewritten(name, spec)
            else:
                yield Copy(name, part, spec)

    headers = zip(base.index.shards, base.index.headers, strict=True)
    return [list(_whole(shard, header, steps_of)) for shard, header in headers]


def _places(base: Base) -> Mapping[tuple[SourceFile, str], Sequence[tuple[str, StoredTensor]]]:
    """Weights of each tensor of a file, by name, with the bytes of the file that they are, which make up the tensor."""
    by_file: dict[SourceFile, list[tuple[str, StoredTensor]]] = {}
    for name, weight in base.weights.items():
        for part in weight.parts.values():
            by_file.setdefault(part.file, []).append((name, part))
    found: dict[tuple[SourceFile, str], list[tuple[str, StoredTensor]]] = {}
    for shard, header in zip(base.index.shards, base.index.headers, strict=True):
        parts = sorted(by_file.get(shard.file, []), key=lambda each: each[1].offset)
        tensors = sorted(header.tensors.values(), key=lambda each: each.offset)
        starts = [tensor.offset for tensor in tensors]
        for name, part in parts:
            tensor = tensors[bisect_right(starts, part.offset) - 1]
            found.setdefault((shard.file, tensor.name), []).append((name, part))
    return found


def _whole(
    shard: Shard, header: GgufFile, steps_of: Callable[[StoredTensor], Iterator[Step]]
) -> Iterator[Step]:
    """Steps of a file from the end of its header on, which leave no byte out."""
    end = len(header.raw)
    for tensor in sorted(header.tensors.values(), key=lambda each: each.offset):
        yield from _gap(shard, end, tensor.offset)
        yield from steps_of(tensor)
        end = tensor.offset + tensor.nbytes
    yield from _gap(shard, end, shard.file.size)


def _gap(shard: Shard, start: int, end: int) -> Iterator[Step]:
    if end > start:
        yield Copy(PADDING, StoredTensor(PADDING, U8, (end - start,), shard.file, start))


def as_stored(base: Base, shards: Sequence[ShardPlan]) -> tuple[ShardPlan, ...]:
    """`shards`, those that are copied whole with the file that they are the same as."""
    return tuple(
        replace(shard, same_as=stored.file)
        if all(isinstance(placed.step, Copy) for placed in shard.steps)
        else shard
        for shard, stored in zip(shards, base.index.shards, strict=True)
    )
