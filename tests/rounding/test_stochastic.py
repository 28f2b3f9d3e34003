"""A quarter of a million roundings of every value: a mean off by five standard errors is a wrong mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamconv.kernels.grids import NF4, TableGrid
from streamconv.rounding import ROUNDINGS, Context, uniform
from tests.formats.stored import choose, normal

STOCHASTIC = ROUNDINGS["stochastic"]
DRAWS = 1 << 12
BLOCK = 64


def noise(count: int, seed: int = 0) -> Tensor:
    return uniform(seed, "w", range(1), count, torch.empty(count))


def base(blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and values of a base on the NF4 grid; one scale is 0 and one is negative."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (blocks * BLOCK,), dtype=torch.uint8, generator=generator)
    scales = torch.rand(blocks, generator=generator) + 0.01
    scales[0], scales[1] = 0.0, -0.3
    return codes, scales, NF4.decode(codes) * scales.repeat_interleave(BLOCK)


def mean_is(target: Tensor, draws: Tensor) -> None:
    """`draws` [n, values]: their mean is `target` within five standard errors."""
    error = draws.double().mean(0) - target
    bound = 5 * draws.double().std(0) / len(draws) ** 0.5 + 1e-7
    assert bool((error.abs() <= bound).all())


def test_the_mean_is_base_plus_delta() -> None:
    codes, scales, anchor = base(2)
    codes, anchor, scales = codes[BLOCK:], anchor[BLOCK:], scales[1:]
    # Neighbours of the first and last code lie on one side only; a delta beyond the end would be cut.
    delta = torch.where((codes == 0) | (codes == 15), -anchor.sign(), 1.0) * 1e-3
    many = DRAWS
    context = Context(codes.repeat(many), scales.repeat(many), anchor.repeat(many), noise(many * BLOCK))
    target = (anchor + delta).repeat(many)
    chosen, kept = choose(STOCHASTIC, target, NF4, context)
    values = (NF4.decode(chosen) * kept.repeat_interleave(BLOCK)).view(many, BLOCK)
    mean_is((anchor + delta).double(), values)
    assert bool((chosen.view(many, BLOCK) != codes).any(0).all())  # each entry moves now and then


def test_the_mean_is_the_target_without_a_base_on_the_grid() -> None:
    target = normal((BLOCK,))
    chosen, scales = choose(
        STOCHASTIC, target.repeat(DRAWS), NF4, Context(None, None, None, noise(DRAWS * BLOCK))
    )
    assert torch.equal(scales, target.abs().amax().repeat(DRAWS))
    values = (NF4.decode(chosen) * scales.repeat_interleave(BLOCK)).view(DRAWS, BLOCK)
    mean_is(target.double(), values)


@pytest.mark.parametrize("worst", [0.0, 1 - 2**-24])
def test_an_entry_without_delta_keeps_its_code_whatever_the_noise(worst: float) -> None:
    codes, scales, anchor = base(200)
    # A loader's cast to 16 bit moves the decoded base; that must not move codes.
    target = anchor.bfloat16().float()
    context = Context(codes, scales, target, torch.full_like(target, worst))
    chosen, kept = choose(STOCHASTIC, target, NF4, context)
    assert torch.equal(chosen, codes)
    assert kept is scales


@given(size=st.sampled_from([1e-6, 1e-3, 1.0, 1e6]), seed=st.integers(0, 1000))
def test_codes_never_leave_the_neighbours(size: float, seed: int) -> None:
    codes, scales, _ = base(4)
    codes, scales = codes[BLOCK:], scales[1:]
    delta = normal((3 * BLOCK,), seed, size)
    context = Context(codes, scales, torch.zeros_like(delta), noise(3 * BLOCK, seed))
    chosen, _ = choose(STOCHASTIC, delta, NF4, context)
    x = NF4.decode(codes) + delta / scales.repeat_interleave(BLOCK)
    lower, upper = (NF4.decode(code) for code in NF4.neighbours(x))
    value = NF4.decode(chosen)
    near = 1e-6  # x is computed with one operation more here
    assert bool(((value >= lower - near) & (value <= upper + near)).all())


def test_any_order_of_codes_will_do() -> None:
    shuffled = TableGrid("shuffled", tuple(NF4.values[code] for code in torch.randperm(16).tolist()), 64)
    target = normal((640,))
    context = Context(None, None, None, noise(640))
    values = [grid.decode(choose(STOCHASTIC, target, grid, context)[0]).tolist() for grid in (NF4, shuffled)]
    assert values[0] == values[1]


def test_inputs_are_not_changed() -> None:
    codes, scales, anchor = base(2)
    inputs = (codes, scales, torch.full_like(anchor, 1e-3), noise(2 * BLOCK))
    before = [tensor.clone() for tensor in (anchor, *inputs)]
    choose(STOCHASTIC, anchor, NF4, Context(*inputs))
    assert all(map(torch.equal, (anchor, *inputs), before))
