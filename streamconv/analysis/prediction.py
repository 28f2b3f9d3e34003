"""How much of an update nearest rounding keeps where the base lies on the grid: the dead zone, as a formula.

The *step* of an entry is the scale of its block times the mean of the two gaps between the value of its code and the
values beside it (at an end of the grid, the one gap there is); the *delta-to-step ratio* of a weight is mean |D| over
mean step.

An entry of the base is a value of the grid. Its update d moves it towards a neighbour at distance g and comes to
nothing below g / 2, to g below 3g / 2, and so on: round(d / g) g. For d Gaussian with standard deviation s, the share
of Σd² that is kept, E[round(d / g) g d] / s², is

    K(s / g) = 2 (g / s) Σ_{k ≥ 0} φ((k + ½) g / s)

(k adds ∫ g |d| p(d) beyond (k + ½) g, on both sides). Gaps differ within the grid and scales from block to block, so K
is averaged over the entries of a Gaussian weight: the greatest M of b magnitudes, a block's scale, has the density
2 b φ(M) (2Φ(M) − 1)^(b−1), and the others are Gaussian within ±M. The greatest itself is kept whole, update and all,
because it sets the new scale:

    kept = 1/b + (1 − 1/b) E[K(s / g)],   s = ratio · √(π/2) · E[step]

The entries of a real update are not all of one size: rows and columns of B and A have norms of their own. Sizes are
taken to be log-normal, ln s ~ N(ln m, t²), with t from the update's excess kurtosis κ, as E[d⁴] / E[d²]² = 3 exp(4t²):

    t² = ln(1 + κ/3) / 4,   ratio · E[step] = √(2/π) m exp(t²/2)

and K is averaged over sizes as Σd² has them, ln s ~ N(ln m + 2t², t²). What this leaves out: a new scale moves the
block's other entries too.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamconv.grids import Grid, IntegerGrid, TableGrid

# numpy computes in the calling thread alone; torch would set others to work for this little.
Array = NDArray[np.float64]

# Greatest magnitudes of a block, in standard deviations: beyond both ends lies nothing that counts.
_LEAST, _GREATEST, _POINTS = 0.02, 9.0, 128
# Terms of the sum over k. Beyond s = 2 g it is 1 to ten digits.
_TERMS = 16
_ALL_KEPT = 2.0
# An exponent for which exp is as good as 0. Below it, results would be subnormal, which processors are slow at.
_SMALLEST = -700.0
# Places of a standard normal variable and their weights, for means over it.
_PLACES = [-4 + number / 2 for number in range(17)]
_WEIGHTS = [math.exp(-(place**2) / 2) for place in _PLACES]
_NORMAL = tuple((place, weight / sum(_WEIGHTS)) for place, weight in zip(_PLACES, _WEIGHTS, strict=True))


def code_steps(grid: Grid) -> Tensor:
    """By code, the mean of the gaps beside its value, in units of `scale / peak`: float32."""
    if not isinstance(grid, TableGrid):
        return torch.ones(256)  # integers
    values = torch.tensor(grid.values, dtype=torch.float64)
    rising = torch.tensor(_values(grid), dtype=torch.float64)
    below, above = _gaps(rising)
    return ((below + above) / 2)[torch.searchsorted(rising, values)].float()


def predicted_kept(delta_to_step: float, grid: Grid, kurtosis: float = 0.0) -> float:
    """The share of an update that nearest rounding onto the base's own grid keeps; `delta_to_step` as defined above.

    `kurtosis` is the update's excess kurtosis; less than 0 counts as 0, a Gaussian's. The grid's block must be known
    (`IntegerGrid.of_width`).
    """
    if delta_to_step <= 0:
        return 0.0
    gaps, steps, shares = _entries(_values(grid), grid.block)
    spread = math.sqrt(math.log1p(max(kurtosis, 0.0) / 3) / 4)
    typical = delta_to_step * math.sqrt(math.pi / 2) * float((shares * steps).sum())
    kept = 0.0
    for place, weight in _NORMAL if spread else ((0.0, 1.0),):
        size = typical * math.exp(1.5 * spread**2 + spread * place)
        kept += weight * float((shares * _kept_at(size / gaps)).sum())
    return 1 / grid.block + (1 - 1 / grid.block) * kept


def _kept_at(ratios: Array) -> Array:
    """K of the module's formula, for `ratios` s / g."""
    squares = ratios**2
    sums = np.zeros_like(ratios)
    for k in range(_TERMS):
        sums += np.exp(np.maximum(-0.5 * (k + 0.5) ** 2 / squares, _SMALLEST))
    kept = 2 / (ratios * math.sqrt(2 * math.pi)) * sums
    return np.where(ratios <= _ALL_KEPT, kept, 1.0)


@functools.cache
def _entries(on_grid: tuple[float, ...], block: int) -> tuple[Array, Array, Array]:
    """Kinds of entries that a Gaussian weight of standard deviation 1 has, once it is rounded: flat, float64.

    The gap to the neighbour on the side to which the update moves it, up as often as down; its step; and its share.
    """
    values = torch.tensor(on_grid, dtype=torch.float64)
    below, above = _gaps(values)
    edges = torch.cat((values[:1], (values[1:] + values[:-1]) / 2, values[-1:]))
    greatest = torch.linspace(_LEAST, _GREATEST, _POINTS, dtype=torch.float64)[:, None]
    shares = _occupancy(greatest, edges, block) / 2
    gaps = torch.stack((greatest * below, greatest * above))
    steps = (greatest * (below + above) / 2).expand_as(gaps)
    return gaps.flatten().numpy(), steps.flatten().numpy(), shares.expand_as(gaps).flatten().numpy()


def _occupancy(greatest: Tensor, edges: Tensor, block: int) -> Tensor:
    """[greatest, interval]: share of a Gaussian weight's entries in blocks with that maximum and between neighbouring
    `edges`, which go from -1 to 1 in units of it. They sum to 1.
    """
    inside = torch.special.erf(greatest / math.sqrt(2))  # 2Φ(M) - 1
    density = torch.exp(-greatest.square() / 2 + (block - 1) * inside.log())
    within = torch.special.erf(greatest * edges / math.sqrt(2)).diff(dim=1) / (2 * inside)
    shares: Tensor = density * within
    return shares / shares.sum()


def _gaps(rising: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from each of the values to the one below and the one above it; at an end, both are the one there is."""
    between = rising.diff()
    return torch.cat((between[:1], between)), torch.cat((between, between[-1:]))


def _values(grid: Grid) -> tuple[float, ...]:
    """The grid's values in rising order, in units of the scale."""
    match grid:
        case TableGrid():
            return tuple(sorted({value / grid.peak for value in grid.values}))
        case IntegerGrid():
            peak = int(grid.peak)
            return tuple(value / peak for value in range(-peak, peak + 1))
    raise AssertionError(f"no values are known of the grid {grid.name}")
