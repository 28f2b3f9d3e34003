"""Measures of a cell's codes: how many change, how far they are from the target, and the steps of the grid.

With V the codes' grid values and c a block's final scale over the grid's peak, ||Q - T||² of the block is
c² ||V||² - 2 c <V, T> + ||T||². Double-quantized scales are final when the last cell is done; until then ||V||² and
<V, T> of every block are held, float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.analysis.sums import BlockSums, Sums, block_sums, stretches, total
from streamconv.kernels import kernels_for
from streamconv.kernels.base import block_dots
from streamconv.kernels.grids import block_absmax
from streamconv.planning.plan import Rewrite
from streamconv.planning.scales import lies_on_grid
from streamconv.rounding.adaptive import sum_of_steps
from streamconv.rounding.base import starting_scales
from streamconv.running.cell import KeptDelta, Seen

# What is held for every block of a weight, in bytes.
BYTES_PER_BLOCK = 16


@dataclass(frozen=True, slots=True)
class RoundedSums(Sums):
    """Sums of a weight's codes: <Q - B, D>, ||D||², ||Q - T||²; how many of `count` entries are another grid value than
    the base, itself rounded to the format by nearest, has.
    """

    kept: float
    delta: float
    error: float
    changed: int
    count: int


@dataclass(frozen=True, slots=True)
class GridSums(Sums):
    """Sums of a base on the grid, or rounded to it: the steps of `count` entries, and the blocks' maxima.

    `predicted` is ||D||² times the share of it that nearest rounding is predicted to keep; 0 where the base does not
    lie on the grid, and nothing is.
    """

    steps: float
    count: int
    blocks: BlockSums
    predicted: float = 0.0


@dataclass(frozen=True, slots=True)
class _Cell(Sums):
    changed: int
    squares: float  # ||T||²


def is_on_grid(step: Rewrite) -> bool:
    """Whether the base of a step's target has codes of the output's grid."""
    return lies_on_grid(step.weight, step.merge_base, step.encoder, step.equalizer)


class CodesWatch:
    """Watches one way to choose the codes of a weight; `measures_grid`: also what does not depend on that way."""

    def __init__(self, step: Rewrite, height: int, device: torch.device, measures_grid: bool) -> None:
        grid = step.encoder.grid
        assert grid is not None
        self._step, self._grid, self._height, self._measures_grid = step, grid, height, measures_grid
        self._is_on_grid = is_on_grid(step)
        blocks = -(-step.rows * step.columns // grid.block)
        self._squares = torch.empty(blocks, dtype=torch.float64, device=device)
        self._products = torch.empty_like(self._squares)
        self._cells: dict[int, _Cell] = {}
        self._grids: dict[int, GridSums] = {}

    def __call__(self, seen: Seen) -> None:
        assert seen.codes is not None
        number = seen.rows.start // self._height
        own, scales = self._own(seen)
        first = seen.rows.start * self._step.columns // self._grid.block
        target = seen.target.reshape(-1)
        self._cells[number] = total(
            self._codes(seen.codes[part], own[part], target[part], first + part.start // self._grid.block)
            for part in stretches(target.numel(), target.device, self._grid.block)
        )
        if self._measures_grid:
            blocks = block_sums(seen, self._grid.block)
            self._grids[number] = GridSums(self._steps(own, scales), own.numel(), blocks)

    def rounded(self, kept: KeptDelta, effective: Tensor) -> RoundedSums:
        """Sums when all cells are done; `effective` are the final scales."""
        found = total(self._cells[number] for number in sorted(self._cells))
        scales = effective.double() / self._grid.peak
        error = float(((scales * self._squares - 2 * self._products) * scales).sum()) + found.squares
        count = self._step.rows * self._step.columns
        return RoundedSums(kept.kept, kept.delta, max(error, 0.0), found.changed, count)

    def grid(self) -> GridSums:
        """Sums of the grid when all cells are done, where it was measured."""
        return total(self._grids[number] for number in sorted(self._grids))

    def _own(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Codes and scales of the base: its own where it lies on the grid, else those of nearest rounding."""
        base = seen.base
        if self._is_on_grid and base.codes is not None:
            scales = base.effective
            anchor = base.anchor.view(-1)
            return base.codes, block_absmax(anchor, self._grid.block) if scales is None else scales
        values = base.values.reshape(-1)
        codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
        scales = starting_scales(values, self._grid)
        if self._step.encoder.rounds_scales:
            scales = self._step.encoder.effective_scales(scales)
        return codes, kernels_for(values.device).nearest(values, self._grid, scales, codes)

    def _codes(self, codes: Tensor, own: Tensor, target: Tensor, first: int) -> _Cell:
        """A stretch of a cell, which begins with block `first` of the weight."""
        values, wide = self._grid.decode(codes), target.double()
        changed = int((values != self._grid.decode(own)).sum())
        values = values.double()
        squares = block_dots(values, values, self._grid.block)
        blocks = slice(first, first + squares.numel())
        self._squares[blocks] = squares
        self._products[blocks] = block_dots(values, wide, self._grid.block)
        return _Cell(changed, float(wide.square().sum()))

    def _steps(self, own: Tensor, scales: Tensor) -> float:
        found, block = 0.0, self._grid.block
        for part in stretches(own.numel(), own.device, block):
            first, codes = part.start // block, own[part]
            found += sum_of_steps(codes, scales[first : first - (-codes.numel() // block)], self._grid)
        return found
