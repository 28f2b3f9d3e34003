from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamconv.kernels import TORCH
from streamconv.kernels.in_torch import uniform_streams
from streamconv.rounding import uniform

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def draw(seed: int = 0, name: str = "w", rows: range = range(256), columns: int = 1024) -> Tensor:
    return uniform(seed, name, rows, columns, torch.empty(len(rows) * columns))


def splitmix64(state: int) -> tuple[int, int]:
    """As the paper has it, in Python's integers: the next state and output."""
    state = (state + GAMMA) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def test_it_is_splitmix64_keyed_by_seed_group_and_name() -> None:
    found = (draw(seed=5, rows=range(64, 65), columns=64) * 2**24).to(torch.int64).tolist()
    key = hashlib.blake2b(b"5 1 w", digest_size=8).digest()
    state = (int.from_bytes(key, "little") - GAMMA) & MASK  # the paper steps before its first output
    expected = []
    for _ in range(32):
        state, output = splitmix64(state)
        expected += [(output & 0xFFFFFFFF) >> 8, output >> 40]
    assert found == expected


@given(
    rows=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    columns=st.integers(1, 9),
    start=st.integers(0, 200),
)
def test_tiles_do_not_matter(rows: list[int], columns: int, start: int) -> None:
    whole = draw(rows=range(start, start + sum(rows)), columns=columns)
    pieces = []
    for count in rows:
        pieces.append(draw(rows=range(start, start + count), columns=columns))
        start += count
    assert torch.equal(torch.cat(pieces), whole)


def test_torchs_own_generator_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    first, state = draw(columns=3), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(draw(columns=3), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_are_24_bit_fractions_below_one() -> None:
    numbers = draw().double() * 2**24
    assert torch.equal(numbers, numbers.round())
    assert numbers.min() >= 0
    assert numbers.max() <= 2**24 - 1
    assert bool((numbers % 2 == 1).any())


@pytest.mark.parametrize("name", ["w", "model.layers.0.mlp.up_proj.weight"])
def test_they_are_uniform(name: str) -> None:
    numbers = draw(name=name).double()
    n = numbers.numel()
    assert abs(float(numbers.mean()) - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(numbers.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    for buckets in (256, (numbers * 2**24).long() % 256):  # by high bits, and by low ones
        index = (numbers * 256).long() if isinstance(buckets, int) else buckets
        counts = torch.bincount(index, minlength=256).double()
        chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1024, 64 * 1024])
def test_neighbours_are_uncorrelated(lag: int) -> None:
    numbers = draw().double() - 0.5
    product = numbers[lag:] * numbers[:-lag] * 12
    assert abs(float(product.mean())) < 5 / math.sqrt(product.numel())


@pytest.mark.parametrize(
    "other",
    [draw(seed=1), draw(seed=-1), draw(name="v"), draw(name="w "), draw(rows=range(64, 320))],
    ids=["seed", "negative seed", "name", "longer name", "rows"],
)
def test_streams_are_independent(other: Tensor) -> None:
    first = draw().double() - 0.5
    product = first * (other.double() - 0.5) * 12
    assert abs(float(product.mean())) < 5 / math.sqrt(first.numel())
    assert float((draw() == other).double().mean()) < 1e-5


def test_wide_weights_have_numbers_of_their_own_in_every_row() -> None:
    numbers = draw(rows=range(2), columns=1 << 17)
    assert len(set(numbers.tolist())) > 0.99 * numbers.numel()


@pytest.mark.parametrize("count", [64 * 77 * 3, 64 * 77 * 2 + 5 * 77])
def test_several_streams_at_once_have_the_same_numbers(count: int) -> None:
    """A device draws a cell so; the last stream's may be cut short."""
    keys, out = [3, -(2**62), 2**63 - 1], torch.empty(count)
    uniform_streams(keys, 64 * 77, out)
    expected = torch.empty(3 * 64 * 77)
    for key, part in zip(keys, expected.chunk(3), strict=True):
        TORCH.uniform(key, 0, part)
    assert torch.equal(out, expected[:count])


@pytest.mark.gpu
def test_the_gpu_has_the_same_numbers() -> None:
    rows = range(3, 200)
    assert torch.equal(
        uniform(7, "w", rows, 77, torch.empty(len(rows) * 77, device="cuda")).cpu(), draw(7, "w", rows, 77)
    )
