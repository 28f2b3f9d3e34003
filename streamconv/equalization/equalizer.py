"""Equalization of one weight: W' = diag(r) W diag(s); and of norms that multiply by 1 + w, 1 + w' = (1 + w) s.

It is the last of a weight's updates and like one in all but this: what the update is measured against, the base, is
equalized as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.formats.base import matrix_shape

ROWS, COLUMNS = "rows", "columns"


@dataclass(frozen=True, slots=True)
class Equalizer(ByRows):
    """`roles` name the factors it has: ROWS r [out], COLUMNS s [in], float32; of what has one axis, COLUMNS alone.

    `shift` is 1 for a norm that multiplies by 1 + w, else 0. `parts` are empty in a plan: factors are known once a text
    has gone through the model.
    """

    parameter: str
    shape: Shape
    roles: tuple[str, ...]
    shift: float = 0.0
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its factors."""
        return 4 * sum(map(self.length, self.roles))

    def length(self, role: str) -> int:
        """Entries of a factor."""
        return matrix_shape(self.shape)[0 if role == ROWS else 1]

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` multiplied by its factors, in place."""
        assert prepared.keys() == set(self.roles), f"{self.parameter}: scales are not known yet"
        if COLUMNS in prepared:
            cell.mul_(prepared[COLUMNS])
        if ROWS in prepared:
            cell.mul_(prepared[ROWS][rows.start : rows.stop].unsqueeze(1))
        # So, what is multiplied by 1 stays as it is.
        return cell.add_(prepared[COLUMNS] - 1, alpha=self.shift) if self.shift else cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return False
