"""Parts of several adapters that take the place of the base's, which no two can do in one place: whole tensors, rows of
tokens, a vocabulary, the two sides of a tie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from streamconv.adapters.base import Adapter, Replace
from streamconv.adapters.source import BaseParameters
from streamconv.adapters.tokens import RowsUpdate
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

_APART = "merge one of them, and then the other onto what comes out"


def common_replaces(adapters: Iterable[Adapter]) -> Mapping[str, Replace]:
    """Replacements of all adapters by parameter. Raises AdapterError where two differ."""
    found: dict[str, tuple[Adapter, Replace]] = {}
    for adapter in adapters:
        for replace in adapter.replaces:
            if replace.parameter not in found:
                found[replace.parameter] = (adapter, replace)
                continue
            other, before = found[replace.parameter]
            if not _have_same_bytes(before.tensor, replace.tensor):
                raise AdapterError(
                    f"{other.location} ({before.tensor.name}) and {adapter.location} ({replace.tensor.name}) both hold"
                    f" {replace.parameter} whole, and they differ: the weight can be only one of them; leave one"
                    f" adapter out, or {_APART}"
                )
    return {name: replace for name, (_, replace) in found.items()}


def check_overlaps(adapters: Sequence[Adapter], base: BaseParameters) -> None:
    """Raise AdapterError or UnsupportedError for adapters that cannot be on one base together."""
    for adapter in adapters:
        others = [other for other in adapters if other is not adapter]
        _check_sizes(adapter, others, base)
        _check_tie(adapter, others, base)


def distinct_rows(adapters: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """The adapters without rows of tokens that one before holds alike. Raises AdapterError where two differ."""
    found: dict[tuple[str, int], tuple[Adapter, Tensor]] = {}
    distinct = []
    with TensorReader() as reader:
        for adapter in adapters:
            updates = [
                _distinct(update, adapter, found, reader) if isinstance(update, RowsUpdate) else update
                for update in adapter.updates
            ]
            distinct.append(dataclasses.replace(adapter, updates=tuple(updates)))
    return tuple(distinct)


def _distinct(
    update: RowsUpdate,
    adapter: Adapter,
    found: dict[tuple[str, int], tuple[Adapter, Tensor]],
    reader: TensorReader,
) -> RowsUpdate:
    """The update of those rows that are not in `found`, where all of its rows are noted."""
    rows = reader.load(update.parts["rows"])
    places = []
    for row, place in update.places:
        other, before = found.setdefault((update.parameter, row), (adapter, rows[place]))
        if other is adapter:
            places.append((row, place))
        elif not before.equal(rows[place]):
            raise AdapterError(
                f"{other.location} and {adapter.location} both hold row {row} of {update.parameter} as they trained it"
                f" ({update.parts['rows'].name}), and they differ: it can be only one of them; {_APART}"
            )
    return dataclasses.replace(update, places=tuple(places))


def _check_sizes(adapter: Adapter, others: Iterable[Adapter], base: BaseParameters) -> None:
    """Raise AdapterError where an adapter changes the size of a weight that another has updates for."""
    for replace in adapter.replaces:
        stored = base.find(replace.parameter)
        if stored is None or replace.tensor.shape == stored.shape:
            continue
        for other in others:
            own = any(each.parameter == replace.parameter for each in other.replaces)
            if not own and any(update.parameter == replace.parameter for update in other.updates):
                raise AdapterError(
                    f"{adapter.location} replaces {replace.parameter} with {list(replace.tensor.shape)}, and"
                    f" {other.location} has an update for the base's, {list(stored.shape)}; only adapters that were"
                    " trained on one vocabulary can change the same embedding"
                )


def _check_tie(adapter: Adapter, others: Iterable[Adapter], base: BaseParameters) -> None:
    """Raise UnsupportedError where one adapter parts embedding and head, and another changes them as one."""
    if not adapter.untie or base.tie is None or base.tie.head in base.parameters:
        return
    for other in others:
        changed = {each.parameter for each in other.updates} | {each.parameter for each in other.replaces}
        if not other.untie and base.tie.embedding in changed:
            raise UnsupportedError(
                f"{other.location} changes {base.tie.embedding} and {base.tie.head} as the one tensor that they are in"
                f" the base, and {adapter.location} makes two of them; {_APART}"
            )


def _have_same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    with TensorReader() as reader:
        return (one.dtype, one.shape) == (other.dtype, other.shape) and reader.have_same_bytes(one, other)
