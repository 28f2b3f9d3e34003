"""Share of an update that nearest rounding keeps where the base lies on the grid: the dead zone, as a formula.

The *step* of an entry is the scale of its block times the mean of the two gaps between the value of its code and the
values beside it (at an end of the grid, the one gap there is); the *delta-to-step ratio* of a weight is mean |D| over
mean step.

An entry of the base is a value v of the grid. Its update d comes to nothing until v + d passes the middle of the gap to
a neighbour; each middle m that it passes adds the gap g around it. For d Gaussian with standard deviation s, the share
of Σd² that is kept, E[(Q(v + d) - v) d] / s², is therefore

    K(v, s) = Σ_m (g / s) φ((m - v) / s)

since ∫ d p(d) beyond a distance x is s φ(x / s); where gaps are even, this is 2 (g / s) Σ_{k ≥ 0} φ((k + ½) g / s).
Beyond the ends of the grid the last gap goes on, as a larger entry takes the scale along. Values and scales are those
of a Gaussian weight: the greatest M of b magnitudes, a block's scale, has the density 2 b φ(M) (2Φ(M) - 1)^(b-1), and
the others are Gaussian within ±M. The greatest itself is kept whole, update and all, because it sets the new scale:

    kept = 1/b + (1 - 1/b) E[K(v, s / M)],   s = ratio · √(π/2) · E[step]

The entries of a real update are not all of one size: rows and columns of B and A have norms of their own. Sizes are
taken to be log-normal, ln s ~ N(ln c, t²), with t from the update's excess kurtosis κ, as E[d⁴] / E[d²]² = 3 exp(4t²):

    t² = ln(1 + κ/3) / 4,   ratio · E[step] = √(2/π) c exp(t²/2)

and K is averaged over sizes as Σd² has them, ln s ~ N(ln c + 2t², t²). What this leaves out: a new scale moves the
block's other entries too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamconv.kernels.grids import Grid, TableGrid

# numpy computes in the calling thread alone; torch would set others to work for this little.
Array = NDArray[np.float64]

# Greatest magnitudes of a block, in standard deviations: beyond both ends lies nothing that counts.
_GREATEST = np.linspace(0.02, 9.0, 96)
# Gaps that the grid goes on for beyond each end, and the ratio from which all is kept, but for half a per cent.
_BEYOND = 24
_ALL_KEPT = 3.0
# Places of a standard normal variable and their weights, for means over it.
_PLACES = [-4 + number / 2 for number in range(17)]
_WEIGHTS = [math.exp(-(place**2) / 2) for place in _PLACES]
_NORMAL = tuple((place, weight / sum(_WEIGHTS)) for place, weight in zip(_PLACES, _WEIGHTS, strict=True))
# An exponent for which exp is as good as 0. Below it, results would be subnormal, which processors are slow at.
_SMALLEST = -700.0


def predicted_kept(delta_to_step: float, grid: Grid, kurtosis: float = 0.0) -> float:
    """The share of an update that nearest rounding onto the base's own grid keeps; `delta_to_step` as defined above.

    `kurtosis` is the update's excess kurtosis; less than 0 counts as 0, a Gaussian's. The grid's block must be known
    (`IntegerGrid.of_width`).
    """
    if delta_to_step <= 0 or delta_to_step > _ALL_KEPT:
        return float(delta_to_step > 0)
    weight = _weight(grid)
    spread = math.sqrt(math.log1p(max(kurtosis, 0.0) / 3) / 4)
    typical = delta_to_step * math.sqrt(math.pi / 2) * weight.step
    kept = 0.0
    for place, share in _NORMAL if spread else ((0.0, 1.0),):
        kept += share * weight.kept(typical * math.exp(1.5 * spread**2 + spread * place))
    return 1 / grid.block + (1 - 1 / grid.block) * kept


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A Gaussian weight of standard deviation 1 on a grid.

    `shares` [greatest, value] sum to 1; `distances` [value, middle] and `gaps` [middle] are in units of the scale;
    `step` is the mean step, that of the greatest entries included.
    """

    shares: Array
    distances: Array
    gaps: Array
    step: float

    def kept(self, size: float) -> float:
        """The mean of K over the entries, for updates of standard deviation `size`."""
        kept = 0.0
        for greatest, shares in zip(_GREATEST, self.shares, strict=True):
            exponents = -0.5 * (self.distances * (greatest / size)) ** 2
            density = np.exp(np.maximum(exponents, _SMALLEST)) / math.sqrt(2 * math.pi)
            kept += float(shares @ (density @ self.gaps)) * float(greatest) / size
        return kept


@functools.cache
def _weight_of(values: tuple[float, ...], starts: tuple[float, ...], block: int) -> _Weight:
    """`values` are those of the grid from -1 to 1, and `starts` those of them that entries of the base have."""
    rising = np.array(values)
    shares = _occupancy(rising, block) if len(starts) == len(values) else _density(block)[:, None]
    steps = _steps(rising)[np.searchsorted(rising, starts)]
    first, last = rising[1] - rising[0], rising[-1] - rising[-2]
    beyond = np.arange(1, _BEYOND + 1)
    longer = np.concatenate((rising[0] - first * beyond[::-1], rising, rising[-1] + last * beyond))
    middles = (longer[1:] + longer[:-1]) / 2
    of_greatest = float((_density(block) * _GREATEST).sum()) * (first + last) / 2  # it lies at either end
    of_others = float((shares * _GREATEST[:, None] * steps).sum())
    step = of_greatest / block + (1 - 1 / block) * of_others
    return _Weight(shares, middles - np.array(starts)[:, None], np.diff(longer), step)


def _weight(grid: Grid) -> _Weight:
    if isinstance(grid, TableGrid):
        values = tuple(sorted({value / grid.peak for value in grid.values}))
        return _weight_of(values, values, grid.block)
    # The integers' gaps are even: whichever value an entry has, around it the grid looks the same.
    around = tuple(value / grid.peak for value in range(-_BEYOND, _BEYOND + 1))
    return _weight_of(around, (0.0,), grid.block)


def _steps(rising: Array) -> Array:
    """Mean of the gaps beside each value; at an end, the one there is."""
    gaps = np.diff(rising)
    return (np.concatenate((gaps[:1], gaps)) + np.concatenate((gaps, gaps[-1:]))) / 2


def _occupancy(rising: Array, block: int) -> Array:
    """[greatest, value]: share of the entries that are nearest to each value in blocks with each maximum."""
    edges = np.concatenate((rising[:1], (rising[1:] + rising[:-1]) / 2, rising[-1:]))
    within = np.diff(_erf(_GREATEST[:, None] * edges), axis=1) / (2 * _erf(_GREATEST)[:, None])
    return _density(block)[:, None] * within


def _density(block: int) -> Array:
    """Shares of blocks with each of the maxima; they sum to 1."""
    density = np.exp(-(_GREATEST**2) / 2 + (block - 1) * np.log(_erf(_GREATEST)))
    shares: Array = density / density.sum()
    return shares


def _erf(x: Array) -> Array:
    """2Φ(x) - 1."""
    found: Array = np.vectorize(math.erf)(x / math.sqrt(2))
    return found
