"""AWQ: scales of a weight's inputs with which rounding to the nearest changes its outputs least.

Lin et al. 2023, arXiv 2306.00978, §3.2: inputs that are large on average are the salient ones, and

    s = a^α / √(max a^α · min a^α),   a_j = mean |x_j|,   α of 20 in [0, 1)

is the α for which the error of all consumers' outputs is least,

    Σ tr(E H Eᵀ),   E = Q(W diag(s)) diag(1/s) - W,   H = XᵀX / N,

with Q the output's own format and W the float32 target. α = 0 scales nothing and is one of the 20: by this measure the
result is never worse than without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.formats.base import CELL_ROWS, Encoder
from streamconv.formats.kinds import is_surveyed
from streamconv.kernels import kernels_for
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.base import Context

GRID = tuple(number / 20 for number in range(20))
# Of the mean: an input that is never there asks for no scale, and would decide those of all others.
_LEAST = 1e-4
# Entries of a weight that are rounded at a time.
_TILE = 2**21
_TILE_COPIES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """`weight` float32 [out, in], and how it will be stored; both on the device of the moments."""

    weight: Tensor
    encoder: Encoder


@dataclass(frozen=True, slots=True, eq=False)
class FoundScales:
    """`scales` float32, as they are stored; `loss` is the error above with them, `before` without, and `size` the same
    of the outputs themselves.
    """

    alpha: float
    scales: Tensor
    loss: float
    before: float
    size: float


def find_scales(
    magnitudes: Tensor,
    hessian: Tensor,
    consumers: Sequence[Consumer],
    stored: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
) -> FoundScales:
    """The best scales of the grid. `magnitudes` are a, `hessian` is H [in, in].

    `stored` makes of scales, one for each of `magnitudes`, what storing leaves of them; `spread` of these, one for each
    input [in].
    """
    ones = torch.ones_like(magnitudes, dtype=torch.float32)
    before = _loss(consumers, spread(ones), hessian)
    best = FoundScales(0.0, ones, before, before, sum(output_size(each, hessian) for each in consumers))
    for alpha in GRID[1:]:
        scales = stored(candidate(magnitudes, alpha))
        loss = _loss(consumers, spread(scales), hessian)
        if loss < best.loss:
            best = replace(best, alpha=alpha, scales=scales, loss=loss)
    return best


def candidate(magnitudes: Tensor, alpha: float) -> Tensor:
    """s, float32; all ones where nothing is known."""
    if not bool(magnitudes.any()):
        return torch.ones_like(magnitudes, dtype=torch.float32)
    powers = (magnitudes.double() / magnitudes.double().mean()).clamp(min=_LEAST).pow(alpha)
    return (powers / (powers.max() * powers.min()).sqrt()).float()


def _loss(consumers: Sequence[Consumer], scales: Tensor, hessian: Tensor) -> float:
    return sum(output_error(each, scales, hessian) for each in consumers)


def output_size(consumer: Consumer, hessian: Tensor) -> float:
    """tr(W H Wᵀ), summed in float64."""
    tiles = _tiles(consumer.weight)
    return sum(float((tile @ hessian).mul_(tile).sum(dtype=torch.float64)) for tile in tiles)


def output_error(consumer: Consumer, scales: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ), summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=hessian.device)
    for tile in _tiles(consumer.weight):
        scaled = tile * scales
        error = nearest(scaled, consumer.encoder).div_(scales).sub_(tile)
        total += (error @ hessian).mul_(error).sum(dtype=torch.float64)
    return float(total)


def nearest(target: Tensor, encoder: Encoder) -> Tensor:
    """Values that a loader makes of `target` [rows, in], whole cells, rounded to the nearest of the encoder's grid.

    Scales that are themselves quantized once all are known are as they were before that, and a scale for all of a
    weight is that for `target`: near enough for a choice.
    """
    grid = encoder.grid
    assert grid is not None, "dense weights are not rounded to a grid"
    flat = target.reshape(-1)
    if is_surveyed(encoder):
        encoder = encoder.knowing(float(flat.abs().max()))
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    stored = encoder.effective_scales if encoder.rounds_scales else None
    scales = ROUNDINGS["nearest"].choose(flat, grid, Context(None, None, None, None, stored), codes)
    values = torch.empty_like(flat)
    kernels_for(flat.device).decode(codes, grid, scales, encoder.dequantized_dtype, values)
    return values.view(target.shape)


def working_bytes(columns: int) -> int:
    """Bytes that `find_scales` has at once beside what it is given."""
    return _TILE_COPIES * 4 * _tile_rows(columns) * columns


def _tile_rows(columns: int) -> int:
    return max(1, _TILE // max(1, columns) // CELL_ROWS) * CELL_ROWS


def _tiles(weight: Tensor) -> Iterator[Tensor]:
    height = _tile_rows(weight.shape[1])
    for first in range(0, len(weight), height):
        yield weight[first : first + height]
