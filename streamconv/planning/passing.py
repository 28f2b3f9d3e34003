"""Weights that go through as they are stored, whatever their format; refusals where one of them would change."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from streamconv.adapters.base import Adapter
from streamconv.checkpoint.strict_json import some
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS
from streamconv.formats.base import NO_MARKS, Weight
from streamconv.formats.foreign import quantization_of
from streamconv.formats.linear import module_of
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.gguf_keep import check_kept
from streamconv.planning.keeping import kept_encoders
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, ShardPlan


def check_passes(
    base: Base,
    weights: Mapping[str, Weight],
    updated: Collection[str],
    adapter: Adapter | None,
    choices: Choices,
) -> None:
    """Raise UnsupportedError where a weight would have to be decoded, or written, and cannot be.

    `weights` are those of the output by name, `updated` the names of those that an adapter adds to.
    """
    if choices.keeps_file:
        check_kept(base, adapter, weights)
        return
    if not choices.passes:
        _check_decoded(weights, updated)
        return
    for name, weight in weights.items():
        stored = base.weights.get(name)
        is_replaced = stored is not None and weight is not stored and stored.is_quantized
        is_touched = weight.is_quantized and (name in updated or stored is None)
        if is_replaced or is_touched:
            raise _touched(base, name, stored if stored is not None and stored.is_quantized else weight)
    _check_names(base, adapter)


def _check_decoded(weights: Mapping[str, Weight], updated: Collection[str]) -> None:
    for name, weight in weights.items():
        if weight.undecoded is not None:
            copied = (
                "" if name in updated else "; a merge without --quant copies what no update touches as it is"
            )
            raise UnsupportedError(
                f"{name} has to be decoded for this, and cannot be: {weight.undecoded}{copied}"
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
    elif adapter is not None and adapter.untie and not _names_head(base):
        new = "gives the model an output head of its own"
    if new is not None:
        raise UnsupportedError(
            f"{base.index.storage.location}: the adapter {new}, and the base is {base.quantized}, whose settings in "
            "config.json go along as they are and do not tell of new modules; give the 16-bit base model instead"
        )


def _names_head(base: Base) -> bool:
    """Whether the settings name the tied head, which they then leave in 16 bit wherever it is."""
    settings = json.dumps(dict(quantization_of(base.index)))
    return base.tie is not None and module_of(base.tie.head).rpartition(".")[2] in settings


def keeps_quantization(
    base: Base,
    adapter: Adapter | None,
    choices: Choices,
    options: MergeOptions,
    shards: Sequence[ShardPlan],
) -> bool:
    """Whether the base's settings of its quantization are those of the output: all that is quantized stays as it is."""
    if choices.passes:
        return True
    replaced = {each.parameter for each in adapter.replaces} if adapter is not None else set()
    kept = kept_encoders(base, base.weights, options)
    if kept and quantization_of(base.index) and replaced.isdisjoint(kept):
        return True
    has_new = base.depth is not None or (adapter is not None and (adapter.untie or adapter.head is not None))
    # Only settings that were compared with what is stored: others may be labelled wrongly, and are written anew.
    is_right = choices.quant is not None and choices.quant.marks.described is not NO_MARKS.described
    if not is_right or options.quant.lower() != "keep" or has_new or not quantization_of(base.index):
        return False
    return _copied(base, shards) == len(_quantized_parts(base))


def _quantized_parts(base: Base) -> frozenset[str]:
    quantized = (weight for weight in base.weights.values() if weight.is_quantized)
    return frozenset(part.name for weight in quantized for part in weight.parts.values())


def _copied(base: Base, shards: Sequence[ShardPlan]) -> int:
    """Number of tensors of quantized weights that are copied."""
    parts = _quantized_parts(base)
    steps = (placed.step for shard in shards for placed in shard.steps)
    return sum(isinstance(step, Copy) and step.tensor.name in parts for step in steps)


def notes_on_passed(base: Base, choices: Choices, shards: Sequence[ShardPlan]) -> tuple[str, ...]:
    """A sentence on the tensors that are copied as they are stored."""
    if not choices.passes:
        return ()
    told = f"{_copied(base, shards)} tensors of quantized weights ({base.quantized}) are copied byte for byte"
    return (
        f"{told}, not decoded, as no update touches them; the base's settings of its quantization go along",
    )
