"""Sums over a weight's cells: sizes and moments of an update and of what it is added to, float64.

Each cell is summed in stretches small enough for a processor's cache, each in one fixed order, and stretches and cells
are added up in row order. So numbers do not depend on tiles, workers or budgets.

Moments are central, of every stretch by its own mean, and joined by the formulas of Pébay (2008, SAND2008-6212, §3.1):
nothing cancels, whatever the mean.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from streamconv.formats.base import Encoder
from streamconv.kernels.grids import block_absmax
from streamconv.running.cell import Seen

# Elements summed at a time: in float64, they and what is computed of them fit a core's cache. A GPU wants more.
_STRETCH = 1 << 15
_GPU_STRETCH = 1 << 20
OUTLIER_SIGMAS = 6.0


class Addable(Protocol):
    def __add__(self, other: Self, /) -> Self: ...


S = TypeVar("S", bound=Addable)


def total(parts: Iterable[S]) -> S:
    """Their sum, in order. There is at least one."""
    return functools.reduce(operator.add, parts)


def stretches(count: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """`count` elements in stretches of a whole number of `multiple`, but for the last one."""
    least = _STRETCH if device.type == "cpu" else _GPU_STRETCH
    length = max(1, least // multiple) * multiple
    for first in range(0, count, length):
        yield slice(first, min(first + length, count))


@dataclass(frozen=True, slots=True)
class CentralMoments:
    """Count, mean, and sums of the second to fourth powers of distances from the mean."""

    count: int
    mean: float
    second: float
    third: float
    fourth: float

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """`values` are float64, flat."""
        if not values.numel():
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        mean = values.mean()
        centred = values - mean
        squares = centred.square()
        sums = torch.stack((mean, squares.sum(), (squares * centred).sum(), squares.square_().sum()))
        return cls(values.numel(), *sums.tolist())

    def __add__(self, other: Self) -> Self:
        a, b = self, other
        count = a.count + b.count
        if not a.count or not b.count:
            return a if a.count else b
        delta, product = b.mean - a.mean, a.count * b.count
        second = a.second + b.second + delta**2 * product / count
        third = (
            (a.third + b.third)
            + delta**3 * product * (a.count - b.count) / count**2
            + 3 * delta * (a.count * b.second - b.count * a.second) / count
        )
        fourth = (
            (a.fourth + b.fourth)
            + delta**4 * product * (a.count**2 - product + b.count**2) / count**3
            + 6 * delta**2 * (a.count**2 * b.second + b.count**2 * a.second) / count**2
            + 4 * delta * (a.count * b.third - b.count * a.third) / count
        )
        return type(self)(count, a.mean + delta * b.count / count, second, third, fourth)

    @property
    def deviation(self) -> float:
        return float((self.second / self.count) ** 0.5) if self.count else 0.0

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis, that of a Gaussian being 0; 0 where all values are the same."""
        return self.count * self.fourth / self.second**2 - 3 if self.second else 0.0

    @property
    def squares(self) -> float:
        """Sum of the squares of the values themselves."""
        return self.second + self.count * self.mean**2


class Sums:
    """Fields are added up one by one."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class UpdateSums(Sums):
    """Sums of the base B, the target T, the update D = T - B, and Q, the target rounded to the weight's float type.

    `magnitudes` is Σ|D|, `base_error` ||W - Wq||² where the base was rounded first; `changed` counts entries that are
    stored as another number than those of B are, `kept` is <Q - B, D> and `error` ||Q - T||².
    """

    before: CentralMoments
    after: CentralMoments
    update: CentralMoments
    magnitudes: float
    base_error: float
    changed: int
    kept: float
    error: float


def update_sums(seen: Seen, encoder: Encoder) -> UpdateSums:
    """Sums of a cell that is stored dense by `encoder`."""
    base, target = seen.base.values.view(-1), seen.target.reshape(-1)
    dtype = encoder.dtype.torch
    written = seen.written.view(dtype)
    found = [
        _update_sums(base[part], target[part], written[part]) for part in stretches(base.numel(), base.device)
    ]
    nothing = CentralMoments(0, 0.0, 0.0, 0.0, 0.0)
    of_cell = UpdateSums(
        nothing,
        nothing,
        nothing,
        0.0,
        0.0 if seen.base.error is None else float(seen.base.error),
        0,
        0.0,
        0.0,
    )
    return total([of_cell, *found])


def _update_sums(base: Tensor, target: Tensor, written: Tensor) -> UpdateSums:
    stored = base.to(written.dtype)
    before, after, rounded = base.double(), target.double(), written.double()
    delta = after - before
    sums = torch.stack(
        (
            delta.abs().sum(),
            (written != stored).sum().double(),
            ((rounded - before) * delta).sum(),
            (rounded - after).square().sum(),
        )
    )
    magnitudes, changed, kept, error = sums.tolist()
    moments = (CentralMoments.of(before), CentralMoments.of(after), CentralMoments.of(delta))
    return UpdateSums(*moments, magnitudes, 0.0, int(changed), kept, error)


@dataclass(frozen=True, slots=True)
class Outliers(Sums):
    """Entries of base and target further than 6 standard deviations of the base from its mean."""

    before: int
    after: int


def outliers(seen: Seen, base: CentralMoments) -> Outliers:
    """Count outliers of a cell of the weight whose base has the moments `base`."""
    limit = OUTLIER_SIGMAS * base.deviation
    found = []
    for values in (seen.base.values.view(-1), seen.target.reshape(-1)):
        parts = stretches(values.numel(), values.device)
        found.append(sum(int(((values[part].double() - base.mean).abs() > limit).sum()) for part in parts))
    return Outliers(*found)


@dataclass(frozen=True, slots=True)
class Largest:
    """A maximum, which takes the place of a sum."""

    value: float

    def __add__(self, other: Largest) -> Largest:
        return self if self.value >= other.value else other


@dataclass(frozen=True, slots=True)
class BlockSums(Sums):
    """Sums over blocks that share a scale: their number, and the relative change of their greatest magnitude.

    Blocks that are zero in the base are not counted.
    """

    count: int
    change: float
    largest: Largest


def block_sums(seen: Seen, block: int) -> BlockSums:
    """Sums of a cell's blocks of `block` elements."""
    base, target = seen.base.values.view(-1), seen.target.reshape(-1)
    before, after = block_absmax(base, block).double(), block_absmax(target, block).double()
    counted = before > 0
    change = (after[counted] / before[counted] - 1).abs()
    if not change.numel():
        return BlockSums(0, 0.0, Largest(0.0))
    return BlockSums(change.numel(), float(change.sum()), Largest(float(change.max())))
