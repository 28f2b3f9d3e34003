"""Low-rank factors of a matrix that is read in tiles: randomized SVD with subspace iterations (Halko, Martinsson and
Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).

Of a matrix D [m, n] whose rank is at most the number of columns sketched, the factors are exact but for float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Tiles = Callable[[], Iterable[tuple[range, Tensor]]]
"""Reads the matrix anew: its rows in order, with their numbers, float32, on the computing device."""

OVERSAMPLING = 16
"""Columns sketched beyond the rank (Halko et al. recommend 5 to 10; a few more cost next to nothing)."""

_ITERATIONS = 2
_FIRST_RANK = 16


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix to be decomposed: `shape` is [m, n], `seed` that of the sketch."""

    shape: tuple[int, int]
    tiles: Tiles
    seed: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class LowRank:
    """LowRank of `up @ down`, [m, r] and [r, n], float32; both carry the square root of the singular values.

    `squares` and `left` are the sums of squares of the matrix and of what the factors leave of it.
    """

    up: Tensor
    down: Tensor
    squares: float
    left: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def sum_of_squares(matrix: Matrix) -> float:
    return sum(tile.double().square().sum().item() for _, tile in matrix.tiles())


def decompose(matrix: Matrix, rank: int, squares: float, dtype: torch.dtype) -> LowRank:
    """LowRank of `rank`, or of the matrix's least side where that is smaller, rounded to `dtype`.

    `squares` is the matrix's sum of squares.
    """
    u, s, vh = _leading(matrix, rank)
    return _factors(matrix, u, s, vh, min(rank, len(s)), squares, dtype)


def decompose_to_share(
    matrix: Matrix, share: float, most: int, squares: float, dtype: torch.dtype
) -> LowRank:
    """LowRank of the least rank whose norm is at least `share` of the matrix's; of rank `most` where none reaches it.

    The rank sketched doubles until it is enough.
    """
    most = min(most, *matrix.shape)
    sketched = min(_FIRST_RANK, most)
    while True:
        u, s, vh = _leading(matrix, sketched)
        rank = _rank_of(s[:sketched], share, squares)
        if rank is not None or sketched == most:
            return _factors(matrix, u, s, vh, rank or most, squares, dtype)
        sketched = min(2 * sketched, most)


def _rank_of(singular: Tensor, share: float, squares: float) -> int | None:
    """Number of singular values that have `share` of the norm together; None where all of them have less."""
    reached = singular.double().square().cumsum(0) >= share**2 * squares * (1 - 1e-6)
    return int(reached.int().argmax().item()) + 1 if bool(reached.any()) else None


def _leading(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], the k greatest singular values and Vᵀ [k, n], of which the first `rank` are good."""
    m, n = matrix.shape
    columns = min(rank + OVERSAMPLING, m, n)
    generator = torch.Generator().manual_seed(matrix.seed)
    sketch = torch.randn(n, columns, generator=generator).to(matrix.device)
    for _ in range(_ITERATIONS):
        basis = _orthonormal(_times(matrix, sketch))
        sketch = _orthonormal(_transposed_times(matrix, basis))
    basis = _orthonormal(_times(matrix, sketch))
    u, s, vh = torch.linalg.svd(_transposed_times(matrix, basis).T, full_matrices=False)
    return basis @ u, s, vh


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns)[0]
    return q


def _times(matrix: Matrix, right: Tensor) -> Tensor:
    """D right, [m, k]."""
    out = torch.empty(matrix.shape[0], right.shape[1], device=matrix.device)
    for rows, tile in matrix.tiles():
        torch.mm(tile, right, out=out[rows.start : rows.stop])
    return out


def _transposed_times(matrix: Matrix, left: Tensor) -> Tensor:
    """Dᵀ left, [n, k]."""
    out = torch.zeros(matrix.shape[1], left.shape[1], device=matrix.device)
    for rows, tile in matrix.tiles():
        out.addmm_(tile.T, left[rows.start : rows.stop])
    return out


def _factors(
    matrix: Matrix, u: Tensor, s: Tensor, vh: Tensor, rank: int, squares: float, dtype: torch.dtype
) -> LowRank:
    """The first `rank` components as they will be stored, and what they leave, measured in a last pass."""
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).to(dtype).float(), (root[:, None] * vh[:rank]).to(dtype).float()
    left = 0.0
    for rows, tile in matrix.tiles():
        rest = torch.addmm(tile, up[rows.start : rows.stop], down, alpha=-1)
        left += rest.double().square().sum().item()
    return LowRank(up, down, squares, left)
