"""Factors of a matrix in tiles, against a singular value decomposition of the whole in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.extraction.decomposition import (
    LowRank,
    Matrix,
    decompose,
    decompose_to_share,
    sum_of_squares,
)


def matrix(whole: Tensor, height: int = 7, seed: int = 0) -> Matrix:
    def tiles() -> Iterator[tuple[range, Tensor]]:
        for first in range(0, len(whole), height):
            rows = range(first, min(first + height, len(whole)))
            yield rows, whole[rows.start : rows.stop]

    return Matrix((whole.shape[0], whole.shape[1]), tiles, seed, torch.device("cpu"))


def share_of_norm(factors: LowRank) -> float:
    """Norm of what the factors leave by that of the matrix."""
    return float((factors.left / factors.squares) ** 0.5)


def of_spectrum(rows: int, columns: int, singular: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = len(singular)
    u, v = (
        torch.linalg.qr(torch.randn(side, count, generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    product: Tensor = (u * singular) @ v.T
    return product.float()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(1, 50), st.integers(0, 2**31))
def test_a_matrix_of_low_rank_comes_back(rows: int, columns: int, rank: int, height: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    whole = of_spectrum(rows, columns, torch.arange(rank, 0, -1).double(), seed)
    each = matrix(whole, height, seed)
    found = decompose(each, rank, sum_of_squares(each), torch.float32)
    assert found.rank == rank
    assert (found.up @ found.down - whole).norm() <= 2e-6 * whole.norm()
    assert share_of_norm(found) <= 2e-6


def test_of_a_slow_spectrum_it_takes_what_the_best_factors_would() -> None:
    singular = 0.97 ** torch.arange(90).double()
    whole = of_spectrum(120, 90, singular)
    each = matrix(whole)
    found = decompose(each, 8, sum_of_squares(each), torch.float32)
    best = singular[8:].square().sum().sqrt() / singular.square().sum().sqrt()
    assert best <= share_of_norm(found) <= 1.005 * best


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 0.999])
def test_the_rank_is_the_least_with_the_share(share: float) -> None:
    singular = 0.9 ** torch.arange(60).double()
    each = matrix(of_spectrum(80, 60, singular))
    found = decompose_to_share(each, share, 60, sum_of_squares(each), torch.float32)
    shares = (singular.square().cumsum(0) / singular.square().sum()).sqrt()
    assert found.rank == int((shares < share).sum()) + 1
    assert (1 - share_of_norm(found) ** 2) ** 0.5 >= share - 1e-3


def test_a_share_that_no_rank_reaches_ends_at_the_highest() -> None:
    each = matrix(of_spectrum(80, 60, torch.ones(60).double()))
    assert decompose_to_share(each, 0.99, 12, sum_of_squares(each), torch.float32).rank == 12


def test_the_residual_is_that_of_factors_as_stored() -> None:
    whole = of_spectrum(64, 48, torch.tensor([3.0, 1.0], dtype=torch.float64))
    each = matrix(whole)
    found = decompose(each, 2, sum_of_squares(each), torch.bfloat16)
    assert torch.equal(found.up, found.up.bfloat16().float())
    measured = (whole.double() - found.up.double() @ found.down.double()).norm() / whole.double().norm()
    assert share_of_norm(found) == pytest.approx(measured.item(), rel=1e-4)
    assert share_of_norm(found) > 1e-4
