"""A cell of a weight, what is told of one that was rewritten, and what cells add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.formats.base import CELL_ROWS
from streamconv.kernels import pairwise_sum

_STRETCH = 1 << 18


@dataclass(frozen=True, slots=True)
class KeptDelta:
    """Sums over one weight: `kept` is <Q - B, D>, `delta` is ||D||², `base_error` is ||W - Wq||².

    `base_error` is 0 unless the base was rounded first (`--merge-base`).
    """

    kept: float
    delta: float
    base_error: float


@dataclass(frozen=True, slots=True)
class CellBase:
    """A cell of the base: what it decodes to, and where it lies on a grid, the codes and scales of that.

    `anchor` is `values` before a loader's cast to the weight's dtype; `effective` are the scales the output
    will have if the base's are kept. `raw`: the cell's bytes, where the output may have them. `error`: ||W - Wq||²,
    float64 [], of a base that was rounded.
    """

    values: Tensor
    anchor: Tensor
    codes: Tensor | None = None
    effective: Tensor | None = None
    error: Tensor | None = None
    raw: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A cell that has been rewritten: what it was, what the updates made of that, and what came to be stored.

    `target` is float32 [rows, columns], `written` the cell's bytes of the main part; `codes` (flat) and `scales` are
    as the rounding chose them, None where a cell is stored dense. All lie in memory that the next cell overwrites.
    """

    rows: range
    base: CellBase
    target: Tensor
    codes: Tensor | None
    scales: Tensor | None
    written: Tensor


Watch = Callable[[Seen], None]


def cells(rows: range, height: int = CELL_ROWS) -> Iterator[range]:
    """`rows` in cells; `rows` starts on a cell boundary."""
    for first in range(rows.start, rows.stop, height):
        yield range(first, min(first + height, rows.stop))


def inner_product(left: Tensor, right: Tensor) -> float:
    """<left, right> in float64, a stretch at a time: there may be millions of blocks."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for start in range(0, left.numel(), _STRETCH):
        stretch = slice(start, start + _STRETCH)
        total += pairwise_sum(left[stretch].double() * right[stretch])
    return float(total)
