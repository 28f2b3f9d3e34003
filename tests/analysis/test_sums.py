"""Moments and sums against plain float64 arithmetic, in whatever pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamconv.analysis.sums import BlockSums, CentralMoments, Largest, stretches, total

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(-1e6, 1e6), st.integers(0, 2**31))
def test_moments_of_pieces_are_those_of_the_whole(sizes: list[int], centre: float, seed: int) -> None:
    """Far from zero, too, where sums of powers would cancel."""
    generator = torch.Generator().manual_seed(seed)
    values = centre + torch.randn(sum(sizes) + 2, generator=generator, dtype=torch.float64)
    ends = list(itertools.accumulate([*sizes, 2], initial=0))
    pieces = [values[start:end] for start, end in itertools.pairwise(ends)]
    found, whole = total(map(CentralMoments.of, pieces)), CentralMoments.of(values)
    assert found.count == whole.count == len(values)
    assert found.mean == pytest.approx(whole.mean, rel=1e-13, abs=1e-13)
    for name in ("second", "third", "fourth"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6, abs=1e-6), name


def test_moments_against_their_definitions() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = CentralMoments.of(values)
    assert (found.mean, found.second) == (4, 38)
    assert found.third == (-3) ** 3 + (-2) ** 3 + 5**3
    assert found.fourth == 3**4 + 2**4 + 5**4
    assert found.squares == pytest.approx(1 + 4 + 16 + 81)
    assert found.deviation == pytest.approx((38 / 4) ** 0.5)
    assert found.kurtosis == pytest.approx(4 * 722 / 38**2 - 3)


def test_moments_of_nothing_and_of_equal_values() -> None:
    nothing, equal = (
        CentralMoments.of(torch.empty(0, dtype=torch.float64)),
        CentralMoments.of(torch.ones(5).double()),
    )
    assert nothing + equal == equal + nothing == equal
    assert (nothing.kurtosis, equal.kurtosis, equal.deviation) == (0, 0, 0)


def test_block_sums_keep_the_largest() -> None:
    found = BlockSums(2, 0.5, Largest(0.4)) + BlockSums(1, 0.1, Largest(0.1))
    assert found == BlockSums(3, 0.6, Largest(0.4))


@pytest.mark.parametrize("multiple", [1, 64, 50_000])
def test_stretches_are_whole_blocks(multiple: int) -> None:
    found = list(stretches(123_456, CPU, multiple))
    assert [part.start for part in found[1:]] == [part.stop for part in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, 123_456)
    assert all(part.start % multiple == 0 for part in found)
