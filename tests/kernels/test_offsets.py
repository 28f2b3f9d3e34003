"""Grids whose blocks have offsets: the definition in float64, the same bits by all kernels, and feedback on them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from streamconv.dtypes import BF16, F32
from streamconv.kernels import TORCH, Kernels, Start, kernels_for
from streamconv.kernels.grids import INT4, TableGrid, empty_scales
from streamconv.rounding.feedback import FeedbackOptions, feedback
from streamconv.rounding.metric import Statistics
from streamconv.rounding.search import searched_scales

CPU = torch.device("cpu")
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Range:
    """The first code is the least of a block, the last one the greatest."""

    def start(self, values: Tensor) -> Tensor:
        least, greatest = values.amin(1), values.amax(1)
        scale = (greatest - least) * 8 / 15
        return torch.stack((scale, least), dim=1)


GRID = dataclasses.replace(INT4, block=BLOCK, offsets=Range())
KERNELS = [TORCH, kernels_for(CPU)]
by_all = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)


def skewed(rows: int = 16, columns: int = 128, seed: int = 0) -> Tensor:
    """Values about a mean of each block's own, [rows, columns]."""
    drawn = torch.Generator().manual_seed(seed)
    means = torch.randn(rows * columns // BLOCK, 1, generator=drawn)
    return (means + 0.3 * torch.randn(len(means), BLOCK, generator=drawn)).view(rows, columns)


def known(values: Tensor) -> Tensor:
    return TORCH.starting_scales(values, GRID, empty_scales(values.numel(), GRID, CPU))


def levels(scales: Tensor) -> Tensor:
    """All values that a block may have, float64 [blocks, 16]."""
    table = torch.tensor(GRID.values, dtype=torch.float64) - GRID.values[0]
    return table * scales[:, :1].double() + scales[:, 1:].double()


@by_all
def test_nearest_codes_are_those_of_the_nearest_level(kernels: Kernels) -> None:
    values = skewed().flatten()
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    scales = kernels.nearest(values, GRID, None, codes)
    assert torch.equal(scales, known(values))
    distances = (values.double().view(-1, BLOCK, 1) - levels(scales)[:, None]).abs()
    found = distances.gather(2, codes.view(-1, BLOCK, 1).long()).squeeze(2)
    torch.testing.assert_close(found, distances.amin(2), rtol=1e-4, atol=1e-7)


@by_all
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_decoding_is_scale_and_offset_rounded_once(kernels: Kernels, dtype: object) -> None:
    values = skewed().flatten()
    scales, codes = known(values), torch.arange(values.numel()).to(torch.uint8) % 16
    out = torch.empty_like(values)
    cast = BF16 if dtype == BF16 else F32
    kernels.decode(codes, GRID, scales, cast, out)
    expected = levels(scales).gather(1, codes.view(-1, BLOCK).long()).flatten()
    torch.testing.assert_close(out.double(), expected, rtol=2**-8 if cast == BF16 else 1e-5, atol=1e-6)
    assert torch.equal(out, out.to(cast.torch).float())


@by_all
def test_stochastic_codes_have_the_mean_of_their_target(kernels: Kernels) -> None:
    values, draws = skewed(1, 2 * BLOCK).flatten(), 4000
    scales = known(values)
    sums = torch.zeros_like(values)
    noise = torch.rand(draws, values.numel(), generator=torch.Generator().manual_seed(1))
    for each in noise:
        codes, out = torch.empty(values.numel(), dtype=torch.uint8), torch.empty_like(values)
        kernels.stochastic(values, GRID, scales, None, each, codes)
        kernels.decode(codes, GRID, scales, F32, out)
        sums += out
    step = scales[:, 0].repeat_interleave(BLOCK) / 8
    assert bool(((sums / draws - values).abs() < 5 * step / (2 * draws**0.5)).all())


@by_all
def test_without_an_update_stochastic_rounding_leaves_codes(kernels: Kernels) -> None:
    values = skewed().flatten()
    scales, codes = known(values), torch.arange(values.numel()).to(torch.uint8) % 16
    noise, found = torch.rand(values.numel()), torch.empty_like(codes)
    kernels.stochastic(values, GRID, scales, Start(codes, values), noise, found)
    assert torch.equal(found, codes)


@by_all
def test_kept_sums_are_those_of_the_definition(kernels: Kernels) -> None:
    base = skewed().flatten()
    target = base + 0.05 * skewed(seed=5).flatten()
    scales, codes = known(base), torch.empty(base.numel(), dtype=torch.uint8)
    kernels.nearest(target, GRID, scales, codes)
    inner = torch.empty_like(scales)
    sums = kernels.kept(codes, GRID, target, base, base, inner)
    delta = (target - base).double()
    written = levels(scales).gather(1, codes.view(-1, BLOCK).long()).flatten()
    found = (scales.double() * inner.double()).sum()
    torch.testing.assert_close(found, (written * delta).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums[1], delta.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighed", [False, True])
def test_searched_scales_have_less_error_than_the_range(weighed: bool) -> None:
    values = skewed().flatten()
    weights = torch.rand(values.numel(), generator=torch.Generator().manual_seed(2)) if weighed else None

    def error(scales: Tensor) -> float:
        codes, out = torch.empty(values.numel(), dtype=torch.uint8), torch.empty_like(values)
        TORCH.nearest(values, GRID, scales, codes)
        TORCH.decode(codes, GRID, scales, F32, out)
        squares = (out - values).square()
        return float((squares if weights is None else squares * weights).sum())

    assert error(searched_scales(values, GRID, weights)) < 0.93 * error(known(values))


def test_all_kernels_give_the_same_bits() -> None:
    values = skewed(64, 256).flatten()
    found = []
    for kernels in KERNELS:
        scales = empty_scales(values.numel(), GRID, CPU)
        kernels.search(values, GRID, scales)
        codes, out = torch.empty(values.numel(), dtype=torch.uint8), torch.empty_like(values)
        kernels.nearest(values, GRID, scales, codes)
        kernels.decode(codes, GRID, scales, BF16, out)
        found.append((scales, codes, out))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@dataclass(frozen=True, slots=True)
class Stored:
    """Scales and offsets are rounded to bfloat16."""

    grid: TableGrid = GRID
    dequantized_dtype = BF16

    def effective_scales(self, scales: Tensor) -> Tensor:
        return scales.to(torch.bfloat16).float()


@pytest.mark.parametrize("two_sided", [False, True])
def test_feedback_beats_nearest_in_its_metric(two_sided: bool) -> None:
    target = skewed(96, 128)
    drawn = torch.Generator().manual_seed(3)
    inputs, outputs = (torch.randn(400, size, generator=drawn) for size in (128, 96))
    inputs[:, ::3] *= 4
    hessian, output_hessian = (each.T @ each / len(each) for each in (inputs, outputs))
    statistics = Statistics(hessian, None, 400, output_hessian if two_sided else None)
    chosen = feedback(target, statistics, Stored(), FeedbackOptions())

    def loss(codes: Tensor, scales: Tensor) -> float:
        out = torch.empty(target.numel())
        TORCH.decode(codes, GRID, scales, BF16, out)
        errors = (target - out.view(target.shape)).double()
        moved = errors @ hessian.double()
        moved = output_hessian.double() @ moved if two_sided else moved
        return float((moved * errors).sum())

    nearest = torch.empty(target.numel(), dtype=torch.uint8)
    start = Stored().effective_scales(known(target.flatten()))
    TORCH.nearest(target.flatten(), GRID, start, nearest)
    assert loss(chosen.codes, Stored().effective_scales(chosen.scales)) < 0.6 * loss(nearest, start)
