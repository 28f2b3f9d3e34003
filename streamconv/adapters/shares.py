"""Several adapters on one weight: of each a share, W + Σ w·(U(W) - W) with every U(W) made of the original weight.

Updates that multiply, and those of an adapter that was trained on top of another, are of what the adapters before them
made, V + w·(U(V) - V). So adapters of DoRA answer as PEFT's layer does, where each adds to the layer's output what it
changes of the base's alone; one merged into the other's result would be scaled by its norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, UpdateAccess, WholeWeight
from streamconv.checkpoint.types import Shape, StoredTensor

# A cell's memory has no room for three more of its size: the original, what a share makes of it, and the sum.
_STRETCHES = 4
_ROWS = 64


@dataclass(frozen=True, slots=True)
class Share:
    """All `updates` of one weight by one adapter, in their order, to be taken `weight` times.

    `in_turn`: they are of what the adapters before made, not of the original weight. `name` tells the adapter from
    others, whatever its place among them.
    """

    updates: tuple[Update, ...]
    weight: float
    in_turn: bool
    name: str

    @property
    def is_by_rows(self) -> bool:
        return all(update.access is UpdateAccess.ROW for update in self.updates)

    def weighed(self) -> tuple[Update, ...] | None:
        """Updates that add the share to any weight; None where what is added depends on the weight."""
        found = tuple(update.weighed(self.weight) for update in self.updates)
        return None if None in found else tuple(update for update in found if update is not None)


class OfShares:
    """Members of Update that follow from `shares`; parts and what is prepared of them have share and update in front
    of their role (`0.1.lora_A`).
    """

    __slots__ = ()
    shares: tuple[Share, ...]

    @property
    def parts(self) -> Mapping[str, StoredTensor]:
        return {
            f"{place}{role}": tensor
            for place, update in self.placed()
            for role, tensor in update.parts.items()
        }

    @property
    def members_bytes(self) -> int:
        """Bytes that all members hold beside their parts."""
        return sum(update.held_bytes for _, update in self.placed())

    @property
    def solver_bytes(self) -> int:
        return max((update.solver_bytes for _, update in self.placed()), default=0)

    @property
    def needs_original(self) -> bool:
        return any(update.needs_original for _, update in self.placed())

    @property
    def low_rank(self) -> int | None:
        """Sum of the ranks that are known; None where none is."""
        known = [update.low_rank for _, update in self.placed() if update.low_rank is not None]
        return sum(known) or None

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return {
            f"{place}{role}": tensor
            for place, update in self.placed()
            for role, tensor in update.prepare(own(parts, place), device).items()
        }

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return all(update.is_neutral(constants) for _, update in self.placed())

    def placed(self) -> Iterator[tuple[str, Update]]:
        """Every update with the beginning of its parts' names."""
        for number, share in enumerate(self.shares):
            for index, update in enumerate(share.updates):
                yield f"{number}.{index}.", update


def own(parts: Parts, place: str) -> Parts:
    """Those of one update, by their own roles."""
    return {key.removeprefix(place): tensor for key, tensor in parts.items() if key.startswith(place)}


@dataclass(frozen=True, slots=True)
class SharesUpdate(OfShares, ByRows):
    """Shares by rows: none that is in turn may need all of a weight, once one before it does.

    The state holds how many tensors every update's own state has, int64, and then these.
    """

    parameter: str
    shares: tuple[Share, ...]

    @property
    def access(self) -> UpdateAccess:
        """The most that a member asks for."""
        asked = {update.access for _, update in self.placed()}
        return next(
            access
            for access in (UpdateAccess.WHOLE, UpdateAccess.REDUCE_THEN_ROW, UpdateAccess.ROW)
            if access in asked
        )

    @property
    def held_bytes(self) -> int:
        return self.members_bytes

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        """Have every member learn from the rows that it will change."""
        states, learnt, made = self._states(state), list[State](), cell
        learning = [number for number, share in enumerate(self.shares) if not share.is_by_rows]
        last = max((number for number in learning if self.shares[number].in_turn), default=0)
        for number, share in enumerate(self.shares):
            found = made if share.in_turn else cell
            for index, update in enumerate(share.updates):
                before = states[len(learnt)]
                if update.access is UpdateAccess.ROW:
                    learnt.append(())
                else:
                    learnt.append(update.reduce(found, rows, own(prepared, f"{number}.{index}."), before))
            if number < last:
                made = self._taken(number, cell, made.clone(), rows, prepared, states)
        return _joined(learnt)

    def conclude(self, prepared: Parts, state: State) -> State:
        states = self._states(state)
        pairs = zip(self.placed(), states, strict=True)
        return _joined(
            [
                update.conclude(own(prepared, place), learnt) if learnt else ()
                for (place, update), learnt in pairs
            ]
        )

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` with its share of every adapter, some of its rows after the other, in place."""
        states = self._states(state)
        height = -(-len(rows) // _STRETCHES)
        for first in range(0, len(rows), height):
            some = range(rows.start + first, min(rows.start + first + height, rows.stop))
            original = cell[first : first + len(some)]
            made = original.clone()
            for number in range(len(self.shares)):
                made = self._taken(number, original, made, some, prepared, states)
            original.copy_(made)
        return cell

    def _taken(
        self,
        number: int,
        original: Tensor,
        made: Tensor,
        rows: range,
        prepared: Parts,
        states: Sequence[State],
    ) -> Tensor:
        """`made`, which may be used up, with one more share; `original` stays as it is."""
        share = self.shares[number]
        before = sum(len(each.updates) for each in self.shares[:number])
        start = made if share.in_turn else original
        changed = start.clone()
        for index, update in enumerate(share.updates):
            parts = own(prepared, f"{number}.{index}.")
            changed = update.apply(changed, rows, parts, states[before + index])
        if share.weight == 1 and (share.in_turn or number == 0):
            return changed
        return made.add_(changed.sub_(start), alpha=share.weight)

    def _states(self, state: State) -> Sequence[State]:
        """Every update's own state."""
        if not state:
            return [()] * sum(len(share.updates) for share in self.shares)
        found, first = [], 1
        for count in state[0].tolist():
            found.append(state[first : first + count])
            first += count
        return found


def _joined(states: Sequence[State]) -> State:
    counts = torch.tensor([len(state) for state in states])
    return (counts, *(tensor for state in states for tensor in state))


@dataclass(frozen=True, slots=True)
class WholeSharesUpdate(OfShares, WholeWeight):
    """Shares one after the other on the whole weight, in memory: for what SharesUpdate cannot do by rows."""

    parameter: str
    shape: Shape
    shares: tuple[Share, ...]

    @property
    def held_bytes(self) -> int:
        """The original, what is made of it, and what one share makes of that."""
        return 3 * 4 * math.prod(self.shape) + self.members_bytes

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        made = whole.clone()
        for number, share in enumerate(self.shares):
            start = made if share.in_turn else whole
            made.add_(change_of(share, number, start, prepared), alpha=share.weight)
        return made


def change_of(share: Share, number: int, whole: Tensor, prepared: Parts) -> Tensor:
    """U(W) - W of a share for a weight held whole, float32 [rows, columns]; `number` is its place among others."""
    cells = [range(first, min(first + _ROWS, whole.shape[0])) for first in range(0, whole.shape[0], _ROWS)]
    states = []
    for index, update in enumerate(share.updates):
        state: State = ()
        parts = own(prepared, f"{number}.{index}.")
        if update.access is not UpdateAccess.ROW:
            for rows in cells:
                state = update.reduce(whole[rows.start : rows.stop], rows, parts, state)
            state = update.conclude(parts, state)
        states.append(state)
    result = torch.empty_like(whole)
    for rows in cells:
        start = whole[rows.start : rows.stop]
        cell = start.clone()
        for index, update in enumerate(share.updates):
            cell = update.apply(cell, rows, own(prepared, f"{number}.{index}."), states[index])
        torch.sub(cell, start, out=result[rows.start : rows.stop])
    return result
