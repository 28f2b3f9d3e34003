"""The residual against a dense singular value decomposition in float64, and codes that are chosen for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamconv.dtypes import F32, Dtype
from streamconv.rounding import residual as module
from streamconv.rounding.feedback import BaseOnGrid, FeedbackOptions, QuantizedWeight, feedback
from streamconv.rounding.metric import Metric, factored
from streamconv.rounding.residual import FACTOR_DTYPE, eased
from tests.rounding.layers import Trained, inputs, trained

RANKS = (1, 4, 16, 40)
QUICK = FeedbackOptions(sweeps=1, refits=0)


def with_outputs(layer: Trained, seed: int = 9) -> Trained:
    """Whose outputs count differently."""
    drawn = inputs(layer.values.shape[0], torch.Generator().manual_seed(seed))
    moments = drawn.T @ drawn / len(drawn)
    return replace(layer, statistics=replace(layer.statistics, output_hessian=moments))


def run(layer: Trained, options: FeedbackOptions, base: BaseOnGrid | None = None) -> QuantizedWeight:
    return feedback(layer.target, layer.statistics, layer.encoder, options, base=base or layer.base)


def damped(metric: Metric) -> Tensor:
    """The moments in the weight's own order, float64."""
    return metric.matrix.double()[metric.places][:, metric.places]


def whitened(layer: Trained, errors: Tensor, options: FeedbackOptions) -> Tensor:
    """Gᐟ² E Hᐟ² in float64: symmetric roots, where the code has triangles."""
    moments = damped(factored(layer.statistics.hessian, options.damping))
    seen = errors.double() @ root(moments)
    if layer.statistics.output_hessian is None:
        return seen
    return root(damped(factored(layer.statistics.output_hessian, options.output_damping))) @ seen


def root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    found: Tensor = vectors * values.sqrt() @ vectors.T
    return found


@pytest.mark.parametrize(("dtype", "rounding"), [(F32, 0), (FACTOR_DTYPE, 1e-4)])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_no_other_weight_of_that_rank_repairs_more(
    rank: int, two_sided: bool, dtype: Dtype, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamconv.rounding.residual.FACTOR_DTYPE", dtype)
    layer = with_outputs(trained()) if two_sided else trained()
    options = replace(QUICK, residual_rank=rank)
    chosen = run(layer, options)
    assert chosen.residual is not None
    errors = layer.target - layer.written(chosen)
    sizes = torch.linalg.svdvals(whitened(layer, errors, options)).square()
    left = whitened(layer, errors - chosen.residual.values(), options).square().sum()
    least, repaired = float(sizes[rank:].sum()), float(sizes[:rank].sum())
    assert (1 - 1e-5) * least <= float(left) <= 1.0005 * least + rounding * repaired
    assert chosen.residual.before == pytest.approx(float(sizes.sum()), rel=1e-4)
    assert chosen.residual.after == pytest.approx(float(left), rel=1e-4)
    assert chosen.residual.down.shape == (rank, 128)
    assert chosen.residual.up.shape == (96, rank)


def test_a_wide_weight_of_slowly_falling_singular_values() -> None:
    layer = with_outputs(trained(shape=(192, 512)))
    options = replace(QUICK, residual_rank=8)
    chosen = run(layer, options)
    assert chosen.residual is not None
    sizes = torch.linalg.svdvals(whitened(layer, layer.target - layer.written(chosen), options)).square()
    assert sizes[8] > 0.5 * sizes[7]
    assert chosen.residual.after <= 1.001 * float(sizes[8:].sum())


def test_more_rank_leaves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same codes, and for those chosen for it."""
    layer = with_outputs(trained())
    left = [run(layer, replace(QUICK, residual_rank=rank)).residual for rank in RANKS]
    found = [each.after for each in left if each]
    assert found == sorted(found, reverse=True)
    monkeypatch.setattr("streamconv.rounding.feedback.eased", lambda inputs, outputs, _: (inputs, outputs))
    left = [run(layer, replace(QUICK, residual_rank=rank)).residual for rank in RANKS]
    assert len({each.before for each in left if each}) == 1
    same = [each.after for each in left if each]
    assert same == sorted(same, reverse=True)


@pytest.mark.parametrize("two_sided", [False, True])
def test_codes_chosen_for_it_leave_less_than_others(two_sided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = with_outputs(trained()) if two_sided else trained()
    options = FeedbackOptions(residual_rank=16)
    chosen_for_it = run(layer, options).residual
    monkeypatch.setattr("streamconv.rounding.feedback.eased", lambda inputs, outputs, _: (inputs, outputs))
    others = run(layer, options).residual
    assert chosen_for_it is not None
    assert others is not None
    assert chosen_for_it.after < 0.9 * others.after


def test_what_makes_up_for_other_inputs_is_repaired_towards_it() -> None:
    """||X Tᵀ - Z (Q + B A)ᵀ|| on the very inputs falls, where Z are not X."""
    layer = trained()
    reference = inputs(128, torch.Generator().manual_seed(1))
    given = reference + 0.05 * reference.std() * torch.randn(
        reference.shape, generator=torch.Generator().manual_seed(2)
    )
    count = len(given)
    moments = replace(
        layer.statistics, hessian=given.T @ given / count, cross=reference.T @ given / count, tokens=count
    )
    chosen = run(replace(layer, statistics=moments), replace(QUICK, residual_rank=16))
    assert chosen.residual is not None
    wanted, written = reference @ layer.target.T, layer.written(chosen)
    alone, both = (
        (wanted - given @ weight.T).square().sum() for weight in (written, written + chosen.residual.values())
    )
    plain = (wanted - given @ layer.target.T).square().sum()
    assert both < plain < alone


def test_a_weight_that_stays_has_factors_of_zero() -> None:
    layer = replace(trained(), delta=torch.zeros(96, 128))
    chosen = run(layer, replace(QUICK, residual_rank=4))
    assert chosen.keeps_base
    assert chosen.residual is not None
    assert not chosen.residual.values().any()
    assert (chosen.residual.before, chosen.residual.after) == (0, 0)


def test_without_a_rank_there_is_none() -> None:
    assert run(trained(), QUICK).residual is None


def test_a_metric_is_eased_where_it_is_greatest() -> None:
    drawn = inputs(64, torch.Generator().manual_seed(3))
    metric = factored(drawn.T @ drawn / len(drawn), 0.001)
    found, _ = eased(metric, None, 8)
    before, after = (torch.linalg.eigvalsh(damped(each)).flip(0) for each in (metric, found))
    floor = module.EASED * float(before[8])
    expected = torch.cat([before[8:], torch.full((8,), floor, dtype=torch.float64)]).sort(descending=True)
    assert torch.allclose(after, expected.values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_directions_are_taken_where_they_are_worth_most(which: str) -> None:
    flat = factored(torch.eye(32), 0.001)
    steep = factored(torch.diag(torch.logspace(0, -6, 32)), 0.001)
    pair = (steep, flat) if which == "inputs" else (flat, steep)
    found = eased(*pair, 4)
    assert [each is before for each, before in zip(found, pair, strict=True)] == [
        which == "outputs",
        which == "inputs",
    ]


def test_it_is_the_same_every_time() -> None:
    layer = with_outputs(trained())
    one, other = (run(layer, replace(QUICK, residual_rank=4)).residual for _ in range(2))
    assert one is not None
    assert other is not None
    assert torch.equal(one.down, other.down)
    assert torch.equal(one.up, other.up)
