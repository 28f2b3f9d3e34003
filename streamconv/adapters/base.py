"""What an adapter is to the planner: updates keyed by parameter, and nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.dtypes import F32, Dtype
from streamconv.storage.base import Origin


class Update(Protocol):
    """What an adapter does to one parameter; plain data from headers and config.

    Keyed by parameter (`model.layers.0.self_attn.q_proj.weight`), not by module, because some adapters change
    a bias too. Updates of one parameter are applied in list order, each to the result of the one before.
    """

    @property
    def parameter(self) -> str: ...

    @property
    def parts(self) -> Mapping[str, StoredTensor]:
        """The adapter's tensors this update consumes, by role (`lora_A`)."""

    @property
    def reduces(self) -> bool:
        """Whether `reduce` must have seen every cell of the weight before `apply` may see the first."""

    def reduce(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        """Fold one cell into `state`, cells in row order; sums are float64; None stands for the start."""

    def apply(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        """Return the updated rows `rows` of the weight, float32.

        `cell` is float32 [len(rows), columns], as the checkpoint stores the weight, and belongs to this
        call: it may be updated in place and returned. `parts` are the tensors of `self.parts` in float32 on
        the cell's device and are never written to. `state` is what `reduce` ended with.
        """


class ByRows:
    """What every Update shares that need not know anything of a weight before its rows are updated."""

    __slots__ = ()

    @property
    def reduces(self) -> bool:
        return False

    def reduce(self, cell: Tensor, rows: range, parts: Mapping[str, Tensor], state: Tensor | None) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has nothing to learn before rows are updated")


@runtime_checkable
class WholeUpdate(Protocol):
    """An update that needs the whole weight at once: its states end as the weight, kept until the last cell."""

    @property
    def whole_bytes(self) -> int:
        """The most it holds at a time, in bytes."""

    def conclude(self, state: Tensor) -> Tensor:
        """What `apply` is given as its state, from what `reduce` ended with, which may be used up."""


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
class Adapter:
    """A PEFT adapter, read and checked against a base model.

    `untie`: the result's head and embedding differ although the base ties them, so the output stores both.
    `modules` counts the adapted modules by their last name (`q_proj`: 30), for plans and reports; `renamed` says
    how its names were matched with the base's, where they are not the same.
    """

    location: str
    origin: Origin | None
    peft_type: str
    config: Mapping[str, Any]
    updates: tuple[Update, ...]
    replaces: tuple[Replace, ...]
    untie: bool
    modules: Mapping[str, int]
    sha256: str
    renamed: str | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """What an adapter reader needs to know of a base parameter: its logical shape and type."""

    name: str
    shape: Shape
    dtype: Dtype = F32
