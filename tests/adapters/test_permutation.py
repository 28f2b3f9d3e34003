"""First entries of permutations against torch's own."""

from __future__ import annotations

import pytest
import torch

from streamconv.adapters import permutation
from streamconv.adapters.permutation import first_of_permutation


def whole(length: int, seed: int) -> list[int]:
    found: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return found


@pytest.mark.parametrize("seed", [777, 0, -1, 2**40 + 3])
@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 1), (2, 2), (7, 7), (1000, 1000), (300_000, 999)])
def test_they_are_torchs(length: int, count: int, seed: int) -> None:
    assert list(first_of_permutation(length, count, seed)) == whole(length, seed)[:count]
    assert first_of_permutation(length, count + length, seed)[:count] == first_of_permutation(
        length, count, seed
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", [214_748_363, 214_748_364, 8192 * 28672])
def test_long_ones_are_torchs(length: int) -> None:
    """On either side of where torch goes another way."""
    expected = torch.randperm(length, generator=torch.Generator().manual_seed(777))[:1000].tolist()
    assert list(first_of_permutation(length, 1000, 777)) == expected


def test_the_way_of_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Followed to the end in plain Python, several chunks of it."""
    monkeypatch.setattr(permutation, "CHUNK", 64)
    monkeypatch.setattr(permutation, "LONG", 1000)
    generator = torch.Generator().manual_seed(5)
    expected: list[int] = []
    for entry in range(1001):
        number = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator))
        place = number % 2**64 % (entry + 1)
        expected.append(entry)
        expected[entry], expected[place] = expected[place], entry
    for count in (1, 50, 1001):
        assert list(first_of_permutation(1001, count, 5)) == expected[:count]
