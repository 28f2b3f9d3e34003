"""Grids that every block moves by an offset of its own: loops of plain grids, over values less the offsets.

Scales of such a grid are float32 [blocks, 2], a block's scale and its offset, which is the value of code 0: an element
is `(decode(code) - decode(0)) * scale + offset`. With `shifts` taken away, codes are chosen as on any grid. Blocks are
whole, and the peak is 1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from streamconv.dtypes import F32, Dtype
from streamconv.kernels.base import SEARCH_FACTORS, SEARCH_STEPS, Kernels, Start, block_dots
from streamconv.kernels.grids import Grid, TableGrid, empty_scales


def starting_scales(values: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """Scales and offsets of nearest rounding, by the grid's own rule, in `out`."""
    assert grid.offsets is not None
    return out.copy_(grid.offsets.start(values.view(-1, grid.block)))


def nearest(kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
    """See Kernels."""
    if scales is None:
        scales = starting_scales(values, grid, empty_scales(values.numel(), grid, values.device))
    kernels.nearest(_less(values, scales, grid), plain(grid), _factors(scales), codes)
    return scales


def stochastic(
    kernels: Kernels,
    values: Tensor,
    grid: Grid,
    scales: Tensor | None,
    start: Start | None,
    noise: Tensor,
    codes: Tensor,
) -> Tensor:
    """See Kernels."""
    if scales is None:
        scales = starting_scales(values, grid, empty_scales(values.numel(), grid, values.device))
    # From codes on only the difference to their values counts, which knows of no offset.
    moved = _less(values, scales, grid) if start is None else values
    kernels.stochastic(moved, plain(grid), _factors(scales), start, noise, codes)
    return scales


def decode(kernels: Kernels, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
    """See Kernels."""
    kernels.decode(codes, plain(grid), _factors(scales), F32, out)
    out.view(-1, grid.block).add_(shifts(scales, grid)[:, None])
    if dtype != F32:
        out.copy_(out.to(dtype.torch))


def kept(
    kernels: Kernels,
    codes: Tensor,
    grid: Grid,
    target: Tensor,
    base: Tensor,
    anchor: Tensor,
    inner: Tensor,
) -> Tensor:
    """See Kernels; values are above that of code 0, and beside stands the sum of D, which an offset counts for."""
    products = torch.empty(len(inner), dtype=torch.float32, device=inner.device)
    sums = kernels.kept(codes, plain(grid), target, base, anchor, products)
    delta = target - base
    inner[:, 1] = block_dots(delta, torch.ones_like(delta), grid.block)
    torch.sub(products, inner[:, 1], alpha=plain(grid).values[0], out=inner[:, 0])
    return sums


def search(
    kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None = None
) -> None:
    """See Kernels. Fractions of the starting range are tried about its middle, then the best fit to its codes."""
    start = starting_scales(values, grid, scales).clone()
    losses = _losses(kernels, values, grid, scales, weights)[0]

    def keep_better(trial: Tensor) -> None:
        found = _losses(kernels, values, grid, trial, weights)[0]
        is_better = found < losses
        scales.copy_(torch.where(is_better[:, None], trial, scales))
        losses.copy_(torch.where(is_better, found, losses))

    middle = sum(grid.limits) / 2 - plain(grid).values[0]
    for factor in SEARCH_FACTORS:
        trial = start * factor
        trial[:, 1] = start[:, 1] + start[:, 0] * (1 - factor) * middle
        keep_better(trial)
    for _ in range(SEARCH_STEPS):
        levels = _losses(kernels, values, grid, scales, weights)[1]
        keep_better(_fitted(values, levels, scales, grid.block, weights))


def _fitted(values: Tensor, levels: Tensor, scales: Tensor, block: int, weights: Tensor | None) -> Tensor:
    """Scale and offset of each block with the least Σ w (s v + o - t)² for its levels v; as they are where many do."""
    ones = torch.ones_like(levels)
    weighed, counts = (levels, ones) if weights is None else (levels * weights, weights)
    w, v, vv = (
        block_dots(ones, counts, block),
        block_dots(levels, counts, block),
        block_dots(levels, weighed, block),
    )
    t, vt = block_dots(values, counts, block), block_dots(values, weighed, block)
    determinant = w * vv - v * v
    known = determinant > 1e-6 * w * vv
    safe = torch.where(known, determinant, torch.ones_like(determinant))
    scale, offset = (w * vt - v * t) / safe, (vv * t - v * vt) / safe
    return torch.where(known[:, None], torch.stack((scale, offset), dim=1), scales)


def _losses(
    kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Squared error of every block with nearest codes; and their levels above the first, in units of the scale."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    nearest(kernels, values, grid, scales, codes)
    found = torch.empty_like(values)
    decode(kernels, codes, grid, scales, F32, found)
    error = values - found
    levels = grid.decode(codes).sub_(plain(grid).values[0])
    return block_dots(error, error if weights is None else error * weights, grid.block), levels


def plain(grid: Grid) -> TableGrid:
    """The same codes and values, of blocks without offsets."""
    assert isinstance(grid, TableGrid), f"{grid.name} has no offsets"
    return dataclasses.replace(grid, offsets=None)


def shifts(scales: Tensor, grid: Grid) -> Tensor:
    """The number, one a block, that an element is above its code's value times the scale."""
    return torch.sub(scales[:, 1], scales[:, 0], alpha=plain(grid).values[0])


def _factors(scales: Tensor) -> Tensor:
    return scales[:, 0].contiguous()


def _less(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    return (values.view(-1, grid.block) - shifts(scales, grid)[:, None]).view(-1)
