"""An adapter as the planner sees it: updates keyed by parameter, and nothing left over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.dtypes import F32, Dtype
from streamconv.storage.base import Origin

Parts = Mapping[str, Tensor]
"""Tensors by role, float32 on the computing device, never written to: an adapter's own, or what was made of them."""

State = tuple[Tensor, ...]
"""Tensors that an update has learnt from a weight's cells; () before the first."""


class UpdateAccess(StrEnum):
    """Parts of a weight that an update must have seen before it may change the first row."""

    ROW = "row"
    REDUCE_THEN_ROW = "reduce-then-row"  # sums over all of it
    WHOLE = "whole"  # every value, held until the last row is changed


@dataclass(frozen=True, slots=True)
class Product:
    """Change that is `scaling` times the product of two parts: their roles are `left` [out, r] and `right` [r, in],
    kernels after these. `alone` has no parts and adds a product as it is; those that are equal add it alike.
    """

    left: str
    right: str
    scaling: float
    alone: Update


class Update(Protocol):
    """A change of one parameter by an adapter; plain data from headers and config.

    Keyed by parameter (`model.layers.0.self_attn.q_proj.weight`), not by module, because some adapters change
    a bias too. Updates of one parameter are applied in list order, each to the result of the one before.

    A weight passes in cells: `prepare` once, then, unless `access` is ROW, `reduce` for every cell and `conclude`
    once, then `apply` for every cell, in any order and in several threads. ByRows has defaults for all but `apply`
    and `is_neutral`.
    """

    @property
    def parameter(self) -> str: ...

    @property
    def parts(self) -> Mapping[str, StoredTensor]:
        """The adapter's tensors this update consumes, by role (`lora_A`)."""

    @property
    def access(self) -> UpdateAccess: ...

    @property
    def held_bytes(self) -> int:
        """Most bytes held beside `parts`: by `prepare` and what it returns, or of a weight held whole."""

    @property
    def solver_bytes(self) -> int:
        """Bytes of workspace that a GPU's solver takes for a decomposition, beside `held_bytes`."""

    @property
    def cell_copies(self) -> float:
        """Float32 tensors of a cell that `reduce` or `apply` has at once beside the cell, at most."""

    @property
    def needs_original(self) -> bool:
        """Whether the base weight must be as it was before any quantization."""

    @property
    def low_rank(self) -> int | None:
        """Rank of the change, where it is known to be low."""

    @property
    def mirror(self) -> Mapping[str, str]:
        """Roles that hold the same values, transposed, in a tied partner's update, by role; empty if it has none."""

    @property
    def product(self) -> Product | None:
        """The change as a product of two parts; None where it is more than that, or another."""

    def weighed(self, weight: float) -> Update | None:
        """Return what adds `weight` times as much; None where what is added depends on the weight it is added to."""

    def input_directions(self, parts: Parts) -> Tensor | None:
        """Return rows [r, in] that span the inputs of the layer that the change acts on; None if no part holds them."""

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """Return what `reduce` and `apply` are given, once a weight: the product of two factors, a Cayley transform.

        `parts` are the tensors of `self.parts` in float32 on `device`. May return them as they are, and where it makes
        something of its own, `held_bytes` is not 0. Of several outputs, each has it done for itself.
        """

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        """Fold one cell into `state`, cells in row order; sums are float64.

        Neither `cell` nor a state of sums is written to: a cell may come a second time, with the state of before.
        """

    def conclude(self, prepared: Parts, state: State) -> State:
        """Return what `apply` is given, from what `reduce` ended with, which may be used up."""

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """Return the updated rows `rows` of the weight, float32.

        `cell` is float32 [len(rows), columns], as the checkpoint stores the weight, and belongs to this
        call: it may be updated in place and returned.
        """

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        """Whether it changes no weight at all: the adapter was saved before it was trained.

        `constants` are the names of the adapter's tensors whose entries are all one value, with that value.
        """


class ByRows:
    """Defaults of Update, for one that changes rows by its parts alone; others override what differs."""

    __slots__ = ()

    @property
    def access(self) -> UpdateAccess:
        return UpdateAccess.ROW

    @property
    def held_bytes(self) -> int:
        return 0

    @property
    def solver_bytes(self) -> int:
        return 0

    @property
    def cell_copies(self) -> float:
        return 4

    @property
    def needs_original(self) -> bool:
        return False

    @property
    def low_rank(self) -> int | None:
        return None

    @property
    def mirror(self) -> Mapping[str, str]:
        return {}

    @property
    def product(self) -> Product | None:
        return None

    def weighed(self, weight: float) -> Update | None:
        del weight
        return None

    def input_directions(self, parts: Parts) -> Tensor | None:
        del parts
        return None

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        del device
        return parts

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        raise AssertionError(f"{type(self).__name__} has nothing to learn before rows are updated")

    def conclude(self, prepared: Parts, state: State) -> State:
        del prepared
        return state


class WholeWeight(ByRows):
    """Defaults of Update, for one that needs all of a weight to change any of it; others give `changed`.

    The state is the weight, float32 [rows, columns]: as it was, and from the end of the first pass as it becomes.
    """

    __slots__ = ()
    shape: Shape

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        """Return the updated weight; `whole` may be used up."""
        raise NotImplementedError

    @property
    def access(self) -> UpdateAccess:
        return UpdateAccess.WHOLE

    def reduce(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> State:
        """Write a cell to its place."""
        size = (math.prod(self.shape[:-1]), self.shape[-1])
        (whole,) = state or (torch.empty(size, dtype=torch.float32, device=cell.device),)
        whole[rows.start : rows.stop] = cell
        return (whole,)

    def conclude(self, prepared: Parts, state: State) -> State:
        (whole,) = state
        return (self.changed(whole, prepared),)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        return cell.copy_(state[0][rows.start : rows.stop])


def has_zero_part(parts: Iterable[StoredTensor], constants: Mapping[str, float]) -> bool:
    """Whether one of the tensors is all zeros: a product of them is then zero."""
    return any(constants.get(part.name) == 0 for part in parts)


@dataclass(frozen=True, slots=True)
class Replace:
    """The adapter holds the whole parameter (`modules_to_save`): it takes the place of the base's.

    Updates of the same parameter apply to the replacement: PEFT saves the weight under an adapted head so.
    """

    parameter: str
    tensor: StoredTensor


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameters that share one tensor when the config ties them: input embedding and output head."""

    embedding: str
    head: str


@dataclass(frozen=True, slots=True)
class Member:
    """One of several adapters, or one that is weighed: `label` is its method's name, `sha256` that of its content."""

    location: str
    origin: Origin | None
    label: str
    weight: float
    sha256: str


@dataclass(frozen=True, slots=True)
class TaskHead:
    """Head of another task, or with other labels than the base's: the output's class, how many labels it tells apart,
    saved parameters that the base lacks or has with other rows, and those of the base that the class does not have.

    `are_tokens`: whether the labels are a vocabulary, that of speech recognition by CTC.
    """

    architecture: str
    labels: int
    parameters: tuple[str, ...]
    left_out: tuple[str, ...]
    are_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter, read and checked against a base model.

    `untie`: the result's head and embedding differ although the base ties them, so the output stores both. `label` is
    the method's name in sentences. `modules` counts the adapted modules by their last name (`q_proj`: 30), for plans
    and reports; `renamed` says how its names were matched with the base's, where they are not the same. `notes` are
    sentences on what was left out, replaced or chosen, for people: shown in plan, output and model card.

    `multiplies`: its updates scale or rotate a weight instead of adding to it. `records` are the parameters among those
    replaced whose tensor is not trained, but what was trained on. `members` are the adapters that it combines, or the
    one that is weighed; none of an adapter by itself.
    """

    location: str
    origin: Origin | None
    peft_type: str
    label: str
    config: Mapping[str, Any]
    updates: tuple[Update, ...]
    replaces: tuple[Replace, ...]
    untie: bool
    modules: Mapping[str, int]
    sha256: str
    renamed: str | None = None
    notes: tuple[str, ...] = ()
    multiplies: bool = False
    records: frozenset[str] = frozenset()
    members: tuple[Member, ...] = ()
    head: TaskHead | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """Name, logical shape and type of a base parameter: all that an adapter reader needs to know of it.

    `transposed`: whether it is a linear layer's weight stored as [in, out]; None leaves that to shapes and the model.
    `undecoded`: why its shape and values are not known, and what to do; None where they are.
    """

    name: str
    shape: Shape
    dtype: Dtype = F32
    transposed: bool | None = None
    undecoded: str | None = None
