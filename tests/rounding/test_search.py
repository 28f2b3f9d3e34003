from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamconv.adapters.initial import InitialUpdate
from streamconv.dtypes import BF16
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS
from streamconv.kernels import SEARCH_FACTORS, kernels_for
from streamconv.kernels.grids import INT8, NF4, Grid
from streamconv.planning.plan import Access, Rewrite
from streamconv.planning.steps import weight_steps
from streamconv.rounding import ROUNDINGS, Context
from streamconv.rounding.search import searched_scales
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Workers
from tests.formats.stored import W, choose, encoder_for, normal, only_weight, stored, write

SEARCH, NEAREST = ROUNDINGS["search"], ROUNDINGS["nearest"]
NOTHING = Context(None, None, None, None)


def errors(target: Tensor, grid: Grid, codes: Tensor, scales: Tensor) -> Tensor:
    """Squared error of every block, float64."""
    values = grid.decode(codes).double() * scales.double().repeat_interleave(grid.block)[: target.numel()]
    squares = (target.double() - values / grid.peak).square()
    padded = torch.nn.functional.pad(squares, (0, scales.numel() * grid.block - target.numel()))
    return padded.view(-1, grid.block).sum(1)


@pytest.mark.parametrize("grid", [NF4, FORMATS["fp4"].grid, INT8.of_width(64)], ids=["nf4", "fp4", "int8"])
def test_no_block_is_worse_than_with_its_greatest_magnitude(grid: Grid) -> None:
    target = normal((64 * 200 + 7,))
    searched, greatest = (
        errors(target, grid, *choose(each, target, grid, NOTHING)) for each in (SEARCH, NEAREST)
    )
    # Errors are compared in float32, the winner's scale divides with one rounding more.
    assert bool((searched <= greatest * (1 + 1e-5)).all())
    assert float(searched.sum()) < 0.97 * float(greatest.sum())


def test_one_entry_that_moved_does_not_move_the_others() -> None:
    """In nearest rounding the greatest entry sets the scale, and with it the values of all others of its block."""
    codes = torch.arange(64, dtype=torch.uint8) % 16
    target = NF4.decode(codes) * 0.3
    target[15] *= 1.06
    found, scales = choose(SEARCH, target, NF4, NOTHING)
    assert torch.equal(found, codes)
    values = NF4.decode(codes)
    torch.testing.assert_close(scales, (values @ target / (values @ values)).view(1))


def test_the_greatest_magnitude_itself_is_tried() -> None:
    assert 1.0 in SEARCH_FACTORS


def test_zeros_and_nan() -> None:
    codes, scales = choose(SEARCH, torch.zeros(64), NF4, NOTHING)
    assert scales.tolist() == [0.0]
    assert set(codes.tolist()) == {7}
    target = normal((128,))
    target[70] = torch.nan
    assert choose(SEARCH, target, NF4, NOTHING)[1].isfinite().tolist() == [True, False]


# -- with what errors count ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [NF4, FORMATS["fp4"].grid, INT8.of_width(64)], ids=["nf4", "fp4", "int8"])
def test_errors_are_weighed(grid: Grid) -> None:
    target, weights = normal((64 * 200 + 7,)), normal((64 * 200 + 7,), seed=1, size=2.0).exp()
    loss = {}
    for name, given in (("weighed", weights), ("not", None)):
        scales = searched_scales(target, grid, given)
        codes = torch.empty(target.numel(), dtype=torch.uint8)
        kernels_for(target.device).nearest(target, grid, scales, codes)
        values = grid.decode(codes).double() * scales.double().repeat_interleave(grid.block)[: target.numel()]
        loss[name] = float(((target.double() - values / grid.peak).square() * weights.double()).sum())
    assert loss["weighed"] < 0.9 * loss["not"]


def test_equal_weights_are_none() -> None:
    target = normal((64 * 20 + 7,))
    weighed = searched_scales(target, NF4, torch.full_like(target, 2.0))
    torch.testing.assert_close(weighed, searched_scales(target, NF4), rtol=1e-6, atol=0)


def test_an_input_that_is_always_zero_counts_nothing() -> None:
    """The scale then fits the others alone, however far off the greatest entry is."""
    codes = torch.arange(64, dtype=torch.uint8) % 16
    target, weights = NF4.decode(codes) * 0.3, torch.ones(64)
    target[15], weights[15] = 0.36, 0.0
    assert searched_scales(target, NF4, weights).tolist() == pytest.approx([0.3], rel=1e-6)
    assert searched_scales(target, NF4).tolist() != pytest.approx([0.3], rel=1e-3)


# -- with nested scales, which storing moves -----------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a merge wrote of a weight, and what a loader multiplies its codes by."""

    codes: Tensor
    effective: Tensor


def rewritten(step: Rewrite, raw: Tensor) -> Written:
    out = torch.empty(step.encoder.row_offset(step.rows), dtype=torch.uint8)
    with Workers(1) as pool:
        work = WeightWork(step, {}, (), torch.device("cpu"), 0, pool)
        if step.access is Access.REDUCE_THEN_ROW:
            work.reduce(raw, range(step.rows))
            work.end_reduce()
        work.rewrite(raw, range(step.rows), out).wait()
        work.finish()
    codes = torch.empty(step.rows * step.columns, dtype=torch.uint8)
    kernels_for(codes.device).unpack_pairs(out, codes)
    return Written(codes, work.effective_scales())


def test_codes_are_the_nearest_with_the_scales_that_a_loader_has(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, target = tmp_path_factory.mktemp("nested"), normal((130, 96)).bfloat16().float()
    weight = only_weight(write(folder, stored(encoder_for("bfloat16", target), target)))
    encoder = encoder_for("nf4-dq", target)
    step = Rewrite(W, weight, (), encoder, SEARCH)
    assert step.access is Access.REDUCE_THEN_ROW
    written = rewritten(step, target.bfloat16().view(-1).view(torch.uint8))
    flat = target.flatten()
    codes, _ = choose(NEAREST, flat, NF4, Context(None, written.effective, None, None))
    assert torch.equal(written.codes, codes)
    plain = rewritten(replace(step, rounding=NEAREST), target.bfloat16().view(-1).view(torch.uint8))
    ours, theirs = (float(errors(flat, NF4, each.codes, each.effective).sum()) for each in (written, plain))
    assert ours < 0.97 * theirs


def test_one_pass_is_enough_where_scales_are_stored_as_they_are(tmp_path: Path) -> None:
    target = normal((4, 64))
    weight = only_weight(write(tmp_path, stored(encoder_for("bfloat16", target), target)))
    assert Rewrite(W, weight, (), encoder_for("nf4", target), SEARCH).access is Access.ROW


def test_an_update_that_needs_the_whole_weight_first_is_refused(tmp_path: Path) -> None:
    """One pass before the last is all there is, and scales would have to be searched in another."""
    target = normal((6, 64))
    weight = only_weight(write(tmp_path, stored(encoder_for("bfloat16", target), target)))
    update = InitialUpdate(W, (6, 64), {}, "pissa", 2, 0.5, False, BF16)
    once, twice = (encoder_for(quant, target) for quant in ("nf4", "nf4-dq"))
    assert weight_steps(W, weight, (update,), once, None, SEARCH, calibrates=False)
    with pytest.raises(UnsupportedError, match="so does --rounding search with double-quantized scales"):
        weight_steps(W, weight, (update,), twice, None, SEARCH, calibrates=False)
