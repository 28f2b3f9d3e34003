from __future__ import annotations

import torch

from streamconv.kernels.grids import NF4, TableGrid
from streamconv.rounding import ROUNDINGS, Context
from tests.formats.stored import choose

NEAREST = ROUNDINGS["nearest"]
NOTHING = Context(None, None, None, None)
SMALL = TableGrid("small", (-1.0, 0.0, 1.0), 4)


def test_scales_are_greatest_magnitudes_and_codes_the_nearest() -> None:
    target = torch.tensor([0.2, -0.4, 0.1, 0.0, 6.0, 2.9, 3.1, -3.1, 8.0, 3.0])
    codes, scales = choose(NEAREST, target, SMALL, NOTHING)
    assert torch.equal(scales, torch.tensor([0.4, 6.0, 8.0]))
    # 0.2 / 0.4 and 3.0 / 8.0: on a midpoint the lower value is chosen, below it the nearer one.
    assert codes.tolist() == [1, 0, 1, 1, 2, 1, 2, 0, 2, 1]


def test_an_all_zero_block_has_scale_zero_and_a_short_one_bitsandbytes_floor() -> None:
    codes, scales = choose(NEAREST, torch.zeros(70), NF4, NOTHING)
    assert scales.tolist() == [0.0, torch.tensor(1e-38).item()]
    assert set(codes.tolist()) == {7}


def test_given_scales_are_used_and_kept() -> None:
    target = torch.tensor([1.0, 1.9, 2.1, -9.0])
    scales = torch.tensor([4.0])
    codes, kept = choose(NEAREST, target, SMALL, Context(None, scales, None, None))
    assert kept is scales
    assert codes.tolist() == [1, 1, 2, 0]


def test_a_negative_scale_mirrors_the_grid() -> None:
    target = torch.tensor([4.0, 0.1, -3.9, 0.0])
    codes, scales = choose(NEAREST, target, SMALL, Context(None, torch.tensor([-4.0]), None, None))
    assert (SMALL.decode(codes) * scales).tolist() == [4.0, 0.0, -4.0, 0.0]


def test_the_target_is_not_changed() -> None:
    target = torch.linspace(-1, 1, 70)
    before = target.clone()
    choose(NEAREST, target, NF4, NOTHING)
    assert torch.equal(target, before)
