"""The predicted kept share: its limits, simulations of what it models, and where the sum over k is known otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from streamconv.analysis.prediction import predicted_kept
from streamconv.kernels.grids import (
    FP4,
    INT8,
    NF4,
    Grid,
    block_absmax,
    code_steps,
    divide_by_scales,
    multiply_by_scales,
)

GRIDS: dict[str, Grid] = {"nf4": NF4, "fp4": FP4, "int8": INT8.of_width(512)}


def simulated(grid: Grid, size: float, tails: float = 0.0) -> tuple[float, float, float]:
    """Delta-to-step ratio, excess kurtosis of D and kept share of a Gaussian weight and update, entry for entry.

    Scales stay, but for the greatest of a block, which is kept whole: what the formula models. `size` is that of D in
    deviations of W; the logarithms of its entries' sizes vary by `tails`.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2**18, generator=generator)
    scales = block_absmax(weight, grid.block)
    codes = grid.nearest(divide_by_scales(weight, scales, grid.block, grid.peak))
    sizes = torch.exp(tails * torch.randn(2**18, generator=generator))
    delta = size * sizes * torch.randn(2**18, generator=generator)
    start = grid.decode(codes)
    moved = start + divide_by_scales(delta, scales, grid.block, grid.peak)
    change = by_block(grid.decode(grid.nearest(moved)) - start, scales, grid)
    greatest = weight.abs() == scales.repeat_interleave(grid.block)
    change[greatest] = delta[greatest]
    steps = by_block(code_steps(grid)[codes.long()], scales, grid).double()
    wide = delta.double()
    kurtosis = float(wide.pow(4).mean() / wide.square().mean() ** 2 - 3)
    kept = float(change.double() @ wide / wide.square().sum())
    return float(wide.abs().mean() / steps.mean()), kurtosis, kept


def by_block(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    return multiply_by_scales(values, scales, grid.block, torch.empty_like(values), grid.peak)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0])
def test_a_gaussian_update_is_kept_as_predicted(name: str, ratio: float) -> None:
    grid = GRIDS[name]
    unit, _, _ = simulated(grid, 1.0)
    found, _, kept = simulated(grid, ratio / unit)
    assert found == pytest.approx(ratio, rel=1e-3)
    # What is moved beyond an end stays there in the simulation, whose scales do not grow.
    assert predicted_kept(found, grid) == pytest.approx(kept, abs=0.02 if ratio == 1 else 0.01)


@pytest.mark.parametrize("ratio", [0.03, 0.08, 0.2])
def test_an_update_with_long_tails_is_kept_earlier(ratio: float) -> None:
    unit, _, _ = simulated(NF4, 1.0, tails=0.4)
    found, kurtosis, kept = simulated(NF4, ratio / unit, tails=0.4)
    assert kurtosis > 1
    assert predicted_kept(found, NF4, kurtosis) == pytest.approx(kept, abs=0.01)
    assert predicted_kept(found, NF4, kurtosis) > predicted_kept(found, NF4) + 0.001


def test_limits() -> None:
    assert predicted_kept(0.0, NF4) == 0
    assert predicted_kept(1e-3, NF4) == pytest.approx(1 / 64)
    assert predicted_kept(1e-3, GRIDS["int8"]) == pytest.approx(1 / 512)
    assert predicted_kept(100.0, NF4) == pytest.approx(1)
    assert predicted_kept(0.1, NF4, kurtosis=-0.5) == predicted_kept(0.1, NF4)
    shares = [predicted_kept(0.01 * 1.2**place, NF4, kurtosis=1.0) for place in range(30)]
    assert shares == sorted(shares)


def test_even_gaps() -> None:
    """By Poisson's summation formula, 2 (g/s) Σ φ((k + ½) g/s) = 1 + 2 Σ (-1)^m exp(-2 π² m² s² / g²)."""
    for ratio in (0.2, 0.4, 0.8):
        size = ratio * math.sqrt(math.pi / 2)
        one_scale = 1 + 2 * sum((-1) ** m * math.exp(-2 * (math.pi * m * size) ** 2) for m in range(1, 9))
        # Scales of long blocks are nearly all the same.
        long = INT8.of_width(2**20)
        assert predicted_kept(ratio, long) == pytest.approx(one_scale, abs=0.01)


def test_steps_of_codes() -> None:
    values = torch.tensor(NF4.values)
    gaps = values.diff()
    steps = code_steps(NF4)
    assert steps[0] == pytest.approx(float(gaps[0]))
    assert steps[15] == pytest.approx(float(gaps[14]))
    torch.testing.assert_close(steps[1:15], (gaps[:-1] + gaps[1:]) / 2)
    both_zeros = code_steps(FP4)[[0, 8]]
    assert both_zeros[0] == both_zeros[1] > 0
    assert set(code_steps(INT8).tolist()) == {1.0}
