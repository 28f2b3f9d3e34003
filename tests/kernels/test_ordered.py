"""Grids whose blocks are columns in another order: the same as with the columns put in that order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from streamconv.checkpoint.reader import tensor_bytes
from streamconv.dtypes import BF16, F32
from streamconv.kernels import TORCH, Kernels, Start, kernels_for
from streamconv.kernels.grids import NF4, empty_scales
from streamconv.rounding.adaptive import delta_to_step
from streamconv.rounding.feedback import FeedbackOptions, feedback
from streamconv.rounding.metric import Statistics

CPU = torch.device("cpu")
ROWS, COLUMNS = 24, 256
ORDER = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.int32)
PLAIN = NF4.of_block(64)
GRID = dataclasses.replace(PLAIN, order=bytes(tensor_bytes(ORDER)))
by_all = pytest.mark.parametrize("kernels", [TORCH, kernels_for(CPU)], ids=lambda kernels: kernels.name)


def uneven() -> Tensor:
    """Columns of very different size, so that it matters which share a block: [rows, columns]."""
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, COLUMNS, generator=drawn) * 10 ** torch.randn(COLUMNS, generator=drawn)


def moved(flat: Tensor) -> Tensor:
    return flat.view(ROWS, COLUMNS)[:, ORDER.long()].reshape(-1)


@by_all
def test_each_loop_is_that_of_the_columns_in_order(kernels: Kernels) -> None:
    values, noise = uneven().flatten(), torch.rand(ROWS * COLUMNS)
    base, scales = values * 1.1, empty_scales(values.numel(), GRID, CPU)
    kernels.starting_scales(values, GRID, scales)
    assert torch.equal(scales, kernels.starting_scales(moved(values), PLAIN, torch.empty_like(scales)))
    codes, expected = (torch.empty(values.numel(), dtype=torch.uint8) for _ in range(2))
    kernels.nearest(values, GRID, None, codes)
    kernels.nearest(moved(values), PLAIN, None, expected)
    assert torch.equal(moved(codes), expected)
    out, plain = torch.empty_like(values), torch.empty_like(values)
    kernels.decode(codes, GRID, scales, BF16, out)
    kernels.decode(expected, PLAIN, scales, BF16, plain)
    assert torch.equal(moved(out), plain)
    inner, other = torch.empty_like(scales), torch.empty_like(scales)
    sums = kernels.kept(codes, GRID, values, base, base, inner)
    assert torch.equal(sums, kernels.kept(expected, PLAIN, moved(values), moved(base), moved(base), other))
    assert torch.equal(inner, other)
    start = Start(codes.clone(), base)
    kernels.stochastic(values, GRID, scales, start, noise, codes)
    known = Start(moved(start.codes), moved(base))
    kernels.stochastic(moved(values), PLAIN, scales, known, moved(noise), expected)
    assert torch.equal(moved(codes), expected)
    weights = torch.rand(values.numel())
    kernels.search(values, GRID, scales, weights)
    kernels.search(moved(values), PLAIN, other, moved(weights))
    assert torch.equal(scales, other)


def test_adaptive_rounding_measures_blocks_as_they_are() -> None:
    target, base = uneven().flatten(), uneven().flatten() * 1.01
    codes = torch.empty(base.numel(), dtype=torch.uint8)
    scales = TORCH.nearest(base, GRID, None, codes)
    plain = delta_to_step(moved(target), moved(base), moved(codes), scales, PLAIN)
    assert delta_to_step(target, base, codes, scales, GRID) == pytest.approx(plain)


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    grid = GRID
    dequantized_dtype = F32

    def effective_scales(self, scales: Tensor) -> Tensor:
        return scales


@pytest.mark.parametrize("two_sided", [False, True])
def test_feedback_beats_nearest_in_its_metric(two_sided: bool) -> None:
    drawn = torch.Generator().manual_seed(3)
    target = uneven()
    inputs, outputs = (torch.randn(500, size, generator=drawn) for size in (COLUMNS, ROWS))
    inputs += inputs[:, :1]
    hessian, output_hessian = (each.T @ each / len(each) for each in (inputs, outputs))
    chosen = feedback(
        target,
        Statistics(hessian, None, 500, output_hessian if two_sided else None),
        Stored(),
        FeedbackOptions(),
    )

    def loss(codes: Tensor, scales: Tensor) -> float:
        out = torch.empty(target.numel())
        TORCH.decode(codes, GRID, scales, F32, out)
        errors = (target - out.view(target.shape)).double()
        seen = errors @ hessian.double()
        return float(((output_hessian.double() @ seen if two_sided else seen) * errors).sum())

    codes = torch.empty(target.numel(), dtype=torch.uint8)
    scales = TORCH.nearest(target.flatten(), GRID, None, codes)
    assert loss(chosen.codes, chosen.scales) < 0.7 * loss(codes, scales)
