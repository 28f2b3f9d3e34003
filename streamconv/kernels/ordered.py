"""Grids whose blocks are columns in another order than the weight's: loops of plain grids, over columns gathered.

`grid.order` are the columns as they follow each other in blocks (GPTQ's activation order); the weight is whole rows.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from streamconv.dtypes import Dtype
from streamconv.kernels.base import Kernels, Start
from streamconv.kernels.grids import Grid, TableGrid


def prepare(grid: Grid, device: torch.device) -> None:
    """Have all that is made once, for a grid or for its order of columns, on `device` before the first cell."""
    grid.prepare(device)
    if grid.order:
        columns_of(grid.order, device)


def starting_scales(kernels: Kernels, values: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """See Kernels."""
    return kernels.starting_scales(gathered(kernels, values, grid), in_order(grid), out)


def nearest(kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
    """See Kernels."""
    found = torch.empty_like(codes)
    scales = kernels.nearest(gathered(kernels, values, grid), in_order(grid), scales, found)
    _put_back(kernels, found, grid, codes)
    return scales


def search(
    kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None = None
) -> None:
    """See Kernels."""
    weights = None if weights is None else gathered(kernels, weights, grid)
    kernels.search(gathered(kernels, values, grid), in_order(grid), scales, weights)


def stochastic(
    kernels: Kernels,
    values: Tensor,
    grid: Grid,
    scales: Tensor | None,
    start: Start | None,
    noise: Tensor,
    codes: Tensor,
) -> Tensor:
    """See Kernels. Noise belongs to an element, wherever its block has it."""
    found = torch.empty_like(codes)
    if start is not None:
        start = Start(gathered(kernels, start.codes, grid), gathered(kernels, start.values, grid))
    moved, drawn = gathered(kernels, values, grid), gathered(kernels, noise, grid)
    scales = kernels.stochastic(moved, in_order(grid), scales, start, drawn, found)
    _put_back(kernels, found, grid, codes)
    return scales


def decode(kernels: Kernels, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
    """See Kernels."""
    found = torch.empty_like(out)
    kernels.decode(gathered(kernels, codes, grid), in_order(grid), scales, dtype, found)
    _put_back(kernels, found, grid, out)


def kept(
    kernels: Kernels,
    codes: Tensor,
    grid: Grid,
    target: Tensor,
    base: Tensor,
    anchor: Tensor,
    inner: Tensor,
) -> Tensor:
    """See Kernels."""
    moved, before, known = (gathered(kernels, each, grid) for each in (target, base, anchor))
    return kernels.kept(gathered(kernels, codes, grid), in_order(grid), moved, before, known, inner)


def gathered(kernels: Kernels, flat: Tensor, grid: Grid) -> Tensor:
    """Entries of whole rows (flat), block after block; as they are where the grid has the weight's own order."""
    if not grid.order:
        return flat
    columns = columns_of(grid.order, flat.device)
    matrix = flat.view(-1, len(columns))
    out = torch.empty_like(matrix)
    kernels.take_columns(matrix, columns, out)
    return out.view(-1)


def in_order(grid: Grid) -> TableGrid:
    """The same grid over columns that have been gathered."""
    assert isinstance(grid, TableGrid), f"{grid.name} has columns in their own order"
    return dataclasses.replace(grid, order=b"")


@functools.lru_cache(maxsize=8)
def columns_of(order: bytes, device: torch.device) -> Tensor:
    """The columns of blocks, int32."""
    return torch.frombuffer(bytearray(order), dtype=torch.int32).to(device)


def _put_back(kernels: Kernels, found: Tensor, grid: Grid, out: Tensor) -> None:
    columns = columns_of(grid.order, found.device)
    kernels.put_columns(found.view(-1, len(columns)), columns, out.view(-1, len(columns)))
