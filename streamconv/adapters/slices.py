"""Updates of parameters of another class, made into updates of the stored parameters that hold them (`views`).

An update acts on its own rows and columns alone: those of the others are never given to it, so neither order nor number
of the parts of one stored parameter changes what comes out.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, UpdateAccess
from streamconv.adapters.source import BaseParameters, Source
from streamconv.adapters.views import ParameterView, Piece
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError


@dataclass(frozen=True, slots=True)
class SliceUpdate(ByRows):
    """An update of a part of a stored weight: of the cells in `rows` and `columns`, its own rows from `first` on."""

    parameter: str
    shape: Shape
    update: Update
    rows: range
    columns: range
    first: int = 0

    @property
    def parts(self) -> Mapping[str, StoredTensor]:
        return self.update.parts

    @property
    def access(self) -> UpdateAccess:
        return self.update.access

    @property
    def held_bytes(self) -> int:
        return self.update.held_bytes

    @property
    def solver_bytes(self) -> int:
        return self.update.solver_bytes

    @property
    def needs_original(self) -> bool:
        return self.update.needs_original

    @property
    def low_rank(self) -> int | None:
        return self.update.low_rank

    def weighed(self, weight: float) -> SliceUpdate | None:
        found = self.update.weighed(weight)
        return None if found is None else dataclasses.replace(self, update=found)

    def input_directions(self, parts: Parts) -> Tensor | None:
        """Those of the update, where its inputs are all that the stored layer has."""
        is_layer = len(self.shape) == 2 and len(self.columns) == self.shape[1]
        return self.update.input_directions(parts) if is_layer else None

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return self.update.prepare(parts, device)

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        """Fold in what `cell` has of the part; the state stays as it is where that is nothing."""
        of_cell, own = self._overlap(rows)
        if not own:
            return state
        part = cell[of_cell, _slice(self.columns)].contiguous()
        return self.update.reduce(part, own, prepared, state)

    def conclude(self, prepared: Parts, state: State) -> State:
        return self.update.conclude(prepared, state)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` with its share of the part updated, in place."""
        of_cell, own = self._overlap(rows)
        if own:
            part = cell[of_cell, _slice(self.columns)]
            updated = self.update.apply(part.contiguous(), own, prepared, state)
            if updated is not part:
                part.copy_(updated)
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.update.is_neutral(constants)

    def _overlap(self, rows: range) -> tuple[slice, range]:
        """Rows of a cell `rows` that are of the part, and which of the update's they are."""
        step = self.rows.step
        first = max(0, -((self.rows.start - rows.start) // step))
        last = min(len(self.rows), -((self.rows.start - rows.stop) // step))
        if first >= last:
            return slice(0, 0), range(0)
        found = self.rows[first:last]
        of_cell = slice(found[0] - rows.start, found[-1] - rows.start + 1, step)
        return of_cell, range(self.first + first, self.first + last)


def _slice(columns: range) -> slice:
    return slice(columns.start, columns.stop, columns.step)


@dataclass(frozen=True, slots=True)
class SlicesUpdate(ByRows):
    """Many updates of parts of one stored weight, each by its rows alone, found by the rows that a cell has.

    `slices` in the order of their rows, of which neither starts nor ends go back. A part of the update has the role of
    its slice's own, with the number of the slice before it.
    """

    parameter: str
    shape: Shape
    slices: tuple[SliceUpdate, ...]
    parts: Mapping[str, StoredTensor]

    @property
    def held_bytes(self) -> int:
        return sum(each.held_bytes for each in self.slices)

    @property
    def needs_original(self) -> bool:
        return any(each.needs_original for each in self.slices)

    @property
    def low_rank(self) -> int | None:
        """A bound: the ranks of all together."""
        ranks = [each.low_rank for each in self.slices]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    def weighed(self, weight: float) -> SlicesUpdate | None:
        found = tuple(each.weighed(weight) for each in self.slices)
        kept = tuple(each for each in found if each is not None)
        return dataclasses.replace(self, slices=kept) if len(kept) == len(found) else None

    def input_directions(self, parts: Parts) -> Tensor | None:
        pairs = zip(self.slices, self._own(parts), strict=True)
        each = [one.input_directions(own) for one, own in pairs]
        known = [rows for rows in each if rows is not None]
        return torch.cat(known) if len(known) == len(each) else None

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        pairs = zip(self.slices, self._own(parts), strict=True)
        return GroupedParts([one.prepare(own, device) for one, own in pairs])

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` with the parts in its rows updated, in place."""
        first = bisect_right(self.slices, rows.start, key=lambda each: each.rows.stop)
        last = bisect_left(self.slices, rows.stop, key=lambda each: each.rows.start)
        for number in range(first, last):
            cell = self.slices[number].apply(cell, rows, _group(prepared, number), state)
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return all(each.is_neutral(constants) for each in self.slices)

    def _own(self, parts: Parts) -> Iterator[Parts]:
        """Parts of each slice by their roles there."""
        for number, each in enumerate(self.slices):
            yield {role: parts[_role(number, role)] for role in each.parts}


def _group(prepared: Parts, number: int) -> Parts:
    """Parts that one slice has prepared; in a copy, as several adapters have it, by the beginning of their roles."""
    if isinstance(prepared, GroupedParts):
        return prepared.groups[number]
    place = _role(number, "")
    return {key.removeprefix(place): tensor for key, tensor in prepared.items() if key.startswith(place)}


def _role(number: int, role: str) -> str:
    return f"{number}.{role}"


class GroupedParts(Mapping[str, Tensor]):
    """Parts that slices have prepared, each group by itself."""

    def __init__(self, groups: Sequence[Parts]) -> None:
        self.groups = groups

    def __getitem__(self, role: str) -> Tensor:
        number, _, own = role.partition(".")
        return self.groups[int(number)][own]

    def __iter__(self) -> Iterator[str]:
        return (_role(number, role) for number, group in enumerate(self.groups) for role in group)

    def __len__(self) -> int:
        return sum(map(len, self.groups))


def place_updates(
    updates: Sequence[Update], source: Source, base: BaseParameters, orients: bool
) -> tuple[Update, ...]:
    """Updates of stored parameters for all of `updates`, in their order; those for a part become slices.

    `orients`: whether the method knows weights stored as [in, out]. Raises UnsupportedError where an update needs more
    of a weight than its part passes by, AdapterError where two are for the same part under two names.
    """
    if all(update.parameter in base.parameters for update in updates):
        return tuple(updates)
    placed: dict[str, list[Update]] = {}
    regions: dict[tuple[str, range, range], str] = {}
    for update in updates:
        view = None if update.parameter in base.parameters else base.view(update.parameter)
        if view is None:
            placed.setdefault(update.parameter, []).append(update)
            continue
        _check(update, view, source, orients)
        for piece in view.pieces:
            name = piece.stored.name
            other = regions.setdefault((name, piece.rows, piece.columns), update.parameter)
            if other != update.parameter:
                raise AdapterError(
                    f"{source.location}: {other} and {update.parameter} are the same part of {name} of the base, which"
                    " the adapter changes under both names; keep one of them"
                )
            placed.setdefault(name, []).append(_slice_update(update, piece))
    return tuple(update for name, each in placed.items() for update in _grouped(name, each))


def _check(update: Update, view: ParameterView, source: Source, orients: bool) -> None:
    names = [piece.stored.name for piece in view.pieces]
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    form = f"{source.location}: {update.parameter} is " + (
        f"a part of {shown} of the base" if len(names) == 1 else f"stored apart in the base, as {shown}"
    )
    if update.access is UpdateAccess.WHOLE:
        raise UnsupportedError(
            f"{form}, and this adapter's update needs all of a weight at once, which is done for whole stored weights"
            " only; save the base in the form that the adapter was trained on"
        )
    if update.access is not UpdateAccess.ROW and len(names) > 1:
        raise UnsupportedError(
            f"{form}, and this adapter's update needs sums over all of them; save the base in the form that the adapter"
            " was trained on"
        )
    if view.parameter.transposed and not orients:
        raise UnsupportedError(
            f"{form}, which stores it as [in, out], and {source.config.peft_type} adapters are for weights stored as"
            " [out, in]; save the base in the form that the adapter was trained on"
        )


def _slice_update(update: Update, piece: Piece) -> SliceUpdate:
    return SliceUpdate(piece.stored.name, piece.stored.shape, update, piece.rows, piece.columns, piece.first)


def _grouped(name: str, updates: Sequence[Update]) -> Sequence[Update]:
    """The updates of one stored parameter, as one where all are slices by rows: there may be one for each expert."""
    slices = [each for each in updates if isinstance(each, SliceUpdate)]
    if len(slices) < 2 or len(slices) < len(updates):
        return updates
    if any(each.access is not UpdateAccess.ROW for each in slices):
        return updates
    slices.sort(key=lambda each: (each.rows.start, each.rows.stop))
    if any(one.rows.stop > other.rows.stop for one, other in pairwise(slices)):
        return updates
    parts = {_role(n, role): part for n, each in enumerate(slices) for role, part in each.parts.items()}
    return (SlicesUpdate(name, slices[0].shape, tuple(slices), MappingProxyType(parts)),)
