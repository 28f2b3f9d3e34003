from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.grids import NF4, code_steps
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.adaptive import NEAREST_FROM, Adaptive, delta_to_step
from streamconv.rounding.base import Context


def on_grid(rows: int = 64, columns: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Values, codes and scales of a weight that lies on the grid."""
    values = torch.randn(rows * columns, generator=torch.Generator().manual_seed(0))
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    scales = kernels_for(values.device).nearest(values, NF4, None, codes)
    return torch.tensor(NF4.values)[codes.long()] * scales.repeat_interleave(NF4.block), codes, scales


@pytest.mark.parametrize("wanted", [0.01, 0.39, 0.41, 2.0])
def test_the_ratio_is_that_of_the_definition(wanted: float) -> None:
    base, codes, scales = on_grid()
    rising = sorted(NF4.values)
    gaps = [above - below for below, above in itertools.pairwise(rising)]
    steps = [(left + right) / 2 for left, right in zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True)]
    step = sum(
        steps[code] * scales[place // NF4.block].item() for place, code in enumerate(codes.tolist())
    ) / len(codes)
    noise = torch.randn(base.numel(), generator=torch.Generator().manual_seed(1))
    update = noise / noise.abs().mean() * wanted * step
    assert delta_to_step(base + update, base, codes, scales, NF4) == pytest.approx(wanted, rel=1e-4)


def test_what_is_small_is_rounded_at_random_and_what_is_not_to_the_nearest() -> None:
    adaptive = ROUNDINGS["adaptive"]
    assert isinstance(adaptive, Adaptive)
    assert adaptive.settled(NEAREST_FROM * 0.999).name == "stochastic"
    assert adaptive.settled(NEAREST_FROM).name == "nearest"
    assert adaptive.settled(float("inf")).name == "nearest"
    assert adaptive.settled(None).name == "nearest"


def test_a_base_of_zeros_has_no_step() -> None:
    zeros, codes = torch.zeros(64), torch.full((64,), 7, dtype=torch.uint8)
    assert delta_to_step(zeros + 1, zeros, codes, torch.zeros(1), NF4) == float("inf")


def test_it_never_chooses_itself() -> None:
    values = torch.zeros(64)
    with pytest.raises(AssertionError, match="not settled"):
        ROUNDINGS["adaptive"].choose(values, NF4, Context(None, None, None, None), values.byte())


def test_steps_are_symmetric_where_the_grid_is() -> None:
    assert code_steps(NF4)[[0, 15]].tolist() == pytest.approx([1 - 0.6961928, 1 - 0.7229568], rel=1e-6)
