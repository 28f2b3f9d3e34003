"""Weights that go through as they are stored, whatever their format; refusals where one of them would change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from streamconv.adapters.base import Adapter
from streamconv.checkpoint.strict_json import some
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS
from streamconv.formats.base import Weight
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, ShardPlan


def check_passes(
    base: Base,
    weights: Mapping[str, Weight],
    updated: Collection[str],
    adapter: Adapter | None,
    choices: Choices,
    options: MergeOptions,
) -> None:
    """Raise UnsupportedError where a weight would have to be decoded, or written, and cannot be.

    `weights` are those of the output by name, `updated` the names of those that an adapter adds to.
    """
    if not choices.passes:
        _check_decoded(weights, updated, options)
        return
    for name, weight in weights.items():
        stored = base.weights.get(name)
        is_replaced = stored is not None and weight is not stored and stored.is_quantized
        is_touched = weight.is_quantized and (name in updated or stored is None)
        if is_replaced or is_touched:
            raise _touched(base, name, stored if stored is not None and stored.is_quantized else weight)
    _check_names(base, adapter)


def _check_decoded(weights: Mapping[str, Weight], updated: Collection[str], options: MergeOptions) -> None:
    for name, weight in weights.items():
        if weight.undecoded is not None:
            copied = "" if name in updated else "; or leave --quant out, which copies what no update touches"
            raise UnsupportedError(
                f"--quant {options.quant} stores every weight anew, and {name} cannot be decoded: {weight.undecoded}"
                f"{copied}"
            )


def _touched(base: Base, name: str, weight: Weight) -> UnsupportedError:
    where = base.index.storage.location
    if weight.undecoded is not None:
        return UnsupportedError(
            f"{where}: the adapter changes {name}, which is not decoded: {weight.undecoded}"
        )
    others = [each.name for each in base.weights.values() if each.undecoded is not None]
    remedy = (
        f"{some(others, 2)} cannot be decoded either, so give the 16-bit base model instead"
        if others
        else f"choose --quant none or one of {', '.join(FORMATS)}"
    )
    return UnsupportedError(
        f"{where}: its weights are {weight.format}, which is read but not written, and the adapter changes {name}; "
        f"{remedy}"
    )


def _check_names(base: Base, adapter: Adapter | None) -> None:
    """Raise UnsupportedError where modules come to be of which the base's settings of its quantization do not tell."""
    new = None
    if base.depth is not None:
        new = "repeats layers (layer_replication)"
    elif adapter is not None and adapter.head is not None:
        new = f"makes a {adapter.head.architecture} of the base"
    if new is not None:
        raise UnsupportedError(
            f"{base.index.storage.location}: the adapter {new}, and the base is {base.quantized}, whose settings in "
            "config.json go along as they are and do not tell of new modules; give the 16-bit base model instead"
        )


def notes_on_passed(base: Base, choices: Choices, shards: Sequence[ShardPlan]) -> tuple[str, ...]:
    """A sentence on the tensors that are copied as they are stored."""
    if not choices.passes:
        return ()
    parts = {
        part.name for weight in base.weights.values() if weight.is_quantized for part in weight.parts.values()
    }
    steps = (placed.step for shard in shards for placed in shard.steps)
    count = sum(isinstance(step, Copy) and step.tensor.name in parts for step in steps)
    told = f"{count} tensors of quantized weights ({base.quantized}) are copied byte for byte and not decoded"
    return (f"{told}, as no update touches them; the base's settings of its quantization go along",)
