"""Error feedback on layers with a known update; seeds are 0, 1, ... and all that is drawn depends on them alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv import kernels
from streamconv.errors import InputError
from streamconv.kernels.grids import Grid
from streamconv.rounding.columns import descended, fed
from streamconv.rounding.feedback import BaseOnGrid, FeedbackOptions, Statistics, feedback
from streamconv.rounding.layer import Layer, errors_of, rounded, transpose
from streamconv.rounding.metric import (
    compensated,
    factor_in_float32,
    factored,
    preserving,
    solved_in_float32,
)
from streamconv.rounding.scales import greatest, refitted, searched
from tests.formats.stored import normal
from tests.rounding.layers import Trained, inputs, output_moments, trained

PLAIN = FeedbackOptions(preserve_delta=0.0, sweeps=0, refits=0)
QUANTS = ["nf4", "nf4-dq", "fp4", "fp4-dq"]
# Blocks that end with rows, that run on into the next row, and a short last one.
SHAPES = [(96, 128), (70, 96), (33, 70)]
IN_GROUPS = [
    ("w4a16, group size 32", (96, 128)),
    ("w8a16, group size 64", (70, 64)),
    ("nvfp4a16", (68, 128)),
    ("mxfp4a16", (96, 128)),
]
CASES = [*((quant, shape) for quant in QUANTS for shape in SHAPES), *IN_GROUPS]
every_case = pytest.mark.parametrize(("quant", "shape"), CASES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
either_side = pytest.mark.parametrize("two_sided", [False, True], ids=["inputs", "inputs and outputs"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run, where it is set; small products gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_outputs(layer: Trained) -> Trained:
    moments = output_moments(layer.values.shape[0])
    return replace(layer, statistics=replace(layer.statistics, output_hessian=moments))


def run(layer: Trained, options: FeedbackOptions, base: bool = True) -> Tensor:
    given = (layer.statistics, layer.encoder, options, layer.directions)
    return layer.written(feedback(layer.target, *given, layer.base if base else None))


def loss(layer: Trained, written: Tensor, options: FeedbackOptions) -> float:
    """tr(G E H' Eᵀ) as the docstring has it, in float64."""
    error = (layer.target - written).double()
    hessian = preserving(layer.statistics.hessian, options.preserve_delta, layer.directions).double()
    hessian = hessian + options.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    outputs = layer.statistics.output_hessian
    if outputs is not None:
        outputs = outputs.double()
        damping = options.output_damping * outputs.diagonal().mean()
        error_out = (outputs + damping * torch.eye(len(outputs))) @ error
        return float((error_out @ hessian * error).sum())
    return float((error @ hessian * error).sum())


def transposed(layer: Trained, options: FeedbackOptions = PLAIN, shuffled: bool = False) -> Layer:
    hessian = preserving(layer.statistics.hessian, options.preserve_delta, layer.directions)
    outputs = layer.statistics.output_hessian
    target = layer.target if not shuffled else layer.target.flip(0)
    return transpose(
        target,
        factored(hessian, options.damping),
        None if outputs is None else factored(outputs, options.output_damping),
        layer.grid,
        layer.encoder.dequantized_dtype,
    )


# -- what must hold always ---------------------------------------------------------------------------------------


@every_case
@either_side
def test_more_work_is_never_worse(quant: str, shape: tuple[int, int], two_sided: bool) -> None:
    layer = trained(quant, shape)
    layer = with_outputs(layer) if two_sided else layer
    near = loss(layer, layer.nearest(), PLAIN)
    once = loss(layer, run(layer, PLAIN), PLAIN)
    swept = [loss(layer, run(layer, replace(PLAIN, sweeps=count)), PLAIN) for count in (1, 2, 4)]
    fitted = [loss(layer, run(layer, replace(PLAIN, sweeps=2, refits=count)), PLAIN) for count in (0, 1, 3)]
    found = [near, once, *swept]
    # Solutions are compared by float32 products: equal ones may come out a millionth apart.
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(found))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(fitted))
    assert once < 0.75 * near
    assert swept[0] < once


@every_case
def test_without_an_update_the_base_stays(quant: str, shape: tuple[int, int]) -> None:
    layer = trained(quant, shape)
    cross = layer.statistics.hessian * 0.9  # quantized inputs differ, and yet
    statistics = replace(layer.statistics, cross=cross)
    chosen = feedback(
        layer.values, statistics, layer.encoder, FeedbackOptions(), layer.directions, layer.base
    )
    assert chosen.keeps_base
    assert torch.equal(chosen.codes, layer.base.codes)
    assert torch.equal(layer.written(chosen), layer.values)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 140),
    size=st.sampled_from([0.0, 0.01, 0.3]),
    tokens=st.sampled_from([1, 40, 400]),
    quant=st.sampled_from([*QUANTS, "int8"]),
    seed=st.integers(0, 100),
    two_sided=st.booleans(),
)
def test_any_layer_is_rounded_no_worse_than_nearest(
    rows: int, columns: int, size: float, tokens: int, quant: str, seed: int, two_sided: bool
) -> None:
    layer = trained(quant, (rows, columns), size, seed)
    x = inputs(columns, torch.Generator().manual_seed(seed), tokens)
    x[:, ::7] = 0  # inputs that never are anything
    layer = replace(layer, statistics=Statistics(x.T @ x / tokens, None, tokens))
    layer = with_outputs(layer) if two_sided and quant != "int8" else layer
    options = replace(PLAIN, damping=0.1, sweeps=1, refits=1)
    kept = [run(layer, options, base) for base in (False, True)]
    assert all(bool(each.isfinite().all()) for each in kept)
    found = transposed(layer, options)
    scales = layer.encoder.effective_scales(greatest(found))
    near = rounded(found, scales).loss
    for each in kept:
        error = found.transposed((layer.target - each).flatten())
        assert _loss(found, error) <= near * (1 + 1e-4) + 1e-12


def _loss(layer: Layer, errors: Tensor) -> float:
    mixed = layer.inputs.factor.double().T @ errors.double()
    mixed = mixed if layer.outputs is None else mixed @ layer.outputs.factor.double()
    return float(mixed.square().sum())


# -- the maths -----------------------------------------------------------------------------------------------------


def gptq(target: Tensor, hessian: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Frantar et al. 2022, algorithm 1, column by column with the inverse's factor: values [out, in], float64."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()[order][:, order]), upper=True)
    rest, found = target.double()[:, order].clone(), torch.empty_like(target, dtype=torch.float64)
    spread = scales.double().repeat_interleave(64)[: target.numel()].view(target.shape)[:, order]
    for j in range(target.shape[1]):
        codes = grid.nearest((rest[:, j] / spread[:, j]).float())
        values = grid.decode(codes).double() * spread[:, j]
        found[:, order[j]] = values
        rest[:, j:] -= torch.outer((rest[:, j] - values) / upper[j, j], upper[j, j:])
    return found


@every_shape
def test_feedback_is_gptq_with_act_order(shape: tuple[int, int]) -> None:
    layer = trained("nf4", shape, dtype="float32")
    found = transposed(layer)
    scales = greatest(found)
    ours = layer.loaded(found.flat(fed(found, scales).codes), scales, is_base=True)
    damping = PLAIN.damping * layer.statistics.hessian.diagonal().mean()
    theirs = gptq(layer.target, layer.statistics.hessian + damping * torch.eye(shape[1]), scales, layer.grid)
    # A value within float32's rounding of a midpoint may go the other way, and its row differs from there on.
    same = ((ours.double() - theirs).abs() < 1e-6).all(dim=1).double().mean()
    assert same > 0.9
    ratio = loss(layer, ours, PLAIN) / loss(layer, theirs.float(), PLAIN)
    assert abs(ratio - 1) < 0.01


@either_side
@every_shape
def test_the_loss_is_that_of_the_errors(two_sided: bool, shape: tuple[int, int]) -> None:
    layer = with_outputs(trained("nf4-dq", shape)) if two_sided else trained("nf4-dq", shape)
    found = transposed(layer)
    scales = layer.encoder.effective_scales(searched(found, layer.encoder.effective_scales))
    for each in (rounded(found, scales), fed(found, scales), descended(found, scales, fed(found, scales), 1)):
        written = layer.loaded(found.flat(each.codes), scales, is_base=True)
        errors = errors_of(found, scales, each.codes)
        torch.testing.assert_close(found.flat(errors).view(shape), layer.target - written)
        assert each.loss == pytest.approx(loss(layer, written, PLAIN), rel=1e-4)


def test_with_outputs_that_count_alike_rows_are_on_their_own() -> None:
    layer = trained("nf4", (70, 96))
    alike = replace(layer, statistics=replace(layer.statistics, output_hessian=torch.eye(70)))
    options = replace(PLAIN, output_damping=1e-9)
    found = []
    for each in (layer, alike):
        this = transposed(each, options)
        start = fed(this, greatest(this))
        found += [this.flat(start.codes), this.flat(descended(this, greatest(this), start, 1).codes)]
    # Sums are taken in another order: a value on the edge goes the other way now and then, and its row with it.
    assert float((found[0] == found[2]).double().mean()) > 0.99
    assert float((found[1] == found[3]).double().mean()) > 0.99


def test_outputs_that_count_are_rounded_for() -> None:
    plain = trained("nf4", (128, 128), size=0.3)
    both = with_outputs(plain)
    options = replace(PLAIN, sweeps=3)
    ours, theirs = (loss(both, run(layer, options), PLAIN) for layer in (both, plain))
    assert ours < 0.7 * theirs


def test_refitted_scales_are_the_best_for_their_codes() -> None:
    """Without nesting or a cast: no other scales of a row, near or far, have less loss."""
    layer = trained("nf4", (20, 192), dtype="float32")
    found = transposed(layer)
    scales = greatest(found)
    start = fed(found, scales)
    fitted = refitted(found, scales, start)
    codes = found.flat(start.codes)

    def of(scales: Tensor) -> float:
        return loss(layer, layer.loaded(codes, scales, is_base=True), PLAIN)

    assert of(fitted) < of(scales)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1):
        assert of(fitted) < of(fitted * (1 + size * torch.randn(fitted.shape, generator=generator)))


@pytest.mark.parametrize("name", ["nvfp4a16", "w4a16, group size 32"])
@either_side
def test_scales_fitted_in_stretches_lower_the_loss_as_well(
    name: str, two_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many to be found together; each stretch makes up for the ones before."""
    layer = trained(name, (20, 256), dtype="float32")
    layer = with_outputs(layer) if two_sided else layer
    found = transposed(layer)
    scales = greatest(found)
    start = fed(found, scales)
    codes = found.flat(start.codes)

    def of(scales: Tensor) -> float:
        return loss(layer, layer.loaded(codes, scales, is_base=True), PLAIN)

    together = of(refitted(found, scales, start))
    monkeypatch.setattr("streamconv.rounding.scales.MOST", 1)
    monkeypatch.setattr("streamconv.rounding.scales.STRETCH", 4)
    apart = of(refitted(found, scales, start))
    assert apart < of(scales)
    assert of(scales) - apart > 0.7 * (of(scales) - together)


def test_compensation_is_the_least_squares_answer() -> None:
    """Of ||X Tᵀ - Z Qᵀ||² + μ ||(T - Q) Aᵀ||² + λ ||T - Q||²: the gradient is 0 there."""
    generator = torch.Generator().manual_seed(0)
    z = inputs(96, generator)
    x = z + 0.05 * torch.randn(z.shape, generator=generator)
    target, directions = normal((50, 96)), normal((4, 96), 1)
    cross = x.T @ z / len(z)
    statistics = Statistics(z.T @ z / len(z), cross, len(z))
    metric = factored(preserving(statistics.hessian, 0.3, directions), 0.01)
    moved = compensated(target, statistics, metric, 1.0).double()
    whole = metric.matrix[metric.places][:, metric.places].double()
    gradient = (target @ cross).double() - moved @ statistics.hessian.double()
    gradient += (target - moved) @ (whole - statistics.hessian)
    assert float(gradient.norm()) < 1e-5 * float((target @ cross).norm())
    away = [(x @ target.T - z @ each.float().T).square().sum() for each in (target, moved)]
    assert away[1] < away[0]
    assert torch.equal(compensated(target, statistics, metric, 0.0), target)


def test_quantized_inputs_are_made_up_for() -> None:
    layer = trained("nf4", (96, 128))
    generator = torch.Generator().manual_seed(5)
    z = inputs(128, generator)
    x = z + 0.1 * z.std() * torch.randn(z.shape, generator=generator)
    statistics = Statistics(z.T @ z / len(z), x.T @ z / len(z), len(z))
    layer = replace(layer, statistics=statistics)
    away = [
        float(
            (x @ layer.target.T - z @ run(layer, replace(PLAIN, sweeps=2, asymmetry=share)).T).square().sum()
        )
        for share in (0.0, 1.0)
    ]
    assert away[1] < away[0]


# -- the update --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "w4a16"])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_a_small_update_that_is_kept(quant: str, seed: int) -> None:
    layer = trained(quant, (256, 256), size=0.05, seed=seed)
    hessian = layer.statistics.hessian
    assert layer.kept(layer.nearest()) < 0.3
    assert layer.kept(run(layer, FeedbackOptions(preserve_delta=0.0)), hessian) > 0.7
    assert layer.kept(run(layer, FeedbackOptions(preserve_delta=0.3))) > 0.9
    assert layer.kept(run(layer, FeedbackOptions(preserve_delta=1.0))) > 0.95


# -- how it is computed --------------------------------------------------------------------------------------------


@either_side
@pytest.mark.parametrize("quant", ["nf4-dq", "w4a16, group size 32", "w8a16, group size 64"])
def test_compiled_and_torch_choose_the_same(
    quant: str, two_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    layer = trained(quant, (12, 64)) if two_sided else trained(quant, (200, 128))
    layer = with_outputs(layer) if two_sided else layer
    options = FeedbackOptions(sweeps=1, refits=1)
    ours = feedback(layer.target, layer.statistics, layer.encoder, options, layer.directions, layer.base)
    monkeypatch.setattr(kernels, "compiled_kernels", lambda: None)
    theirs = feedback(layer.target, layer.statistics, layer.encoder, options, layer.directions, layer.base)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)


def test_the_number_of_threads_changes_nothing() -> None:
    layer = trained("nf4", (300, 128))
    found = transposed(layer)
    scales = searched(found, layer.encoder.effective_scales)
    before, solutions = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            solutions.append(descended(found, scales, fed(found, scales), 2))
    finally:
        torch.set_num_threads(before)
    for each in solutions[1:]:
        assert torch.equal(each.codes, solutions[0].codes)
        assert torch.equal(each.losses, solutions[0].losses)


def test_inputs_are_not_changed() -> None:
    layer = with_outputs(trained("nf4-dq", (70, 96)))
    cross = layer.statistics.hessian * 0.99
    statistics = replace(layer.statistics, cross=cross)
    outputs = statistics.output_hessian
    assert outputs is not None
    target = layer.target
    given = (
        target,
        statistics.hessian,
        cross,
        outputs,
        layer.directions,
        layer.base.codes,
        layer.base.scales,
    )
    before = [tensor.clone() for tensor in given]
    feedback(target, statistics, layer.encoder, FeedbackOptions(), layer.directions, layer.base)
    assert all(map(torch.equal, given, before))


# -- what cannot be calibrated -------------------------------------------------------------------------------------


def test_a_moment_that_is_not_finite_is_refused() -> None:
    moments = torch.eye(64)
    moments[3, 5] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        factored(moments, 0.01)


def test_damping_grows_until_there_is_a_factor() -> None:
    """Here there is none with a thousandth and a hundredth."""
    moments = torch.eye(8)
    moments[0, 1] = moments[1, 0] = 1.05
    found = factored(moments, 0.001)
    torch.testing.assert_close(found.matrix.diagonal(), torch.full((8,), 1.1))
    torch.testing.assert_close(found.factor @ found.factor.T, found.matrix)
    moments[0, 1] = moments[1, 0] = 9.0
    with pytest.raises(InputError, match="no Cholesky factor with 1 of their mean"):
        factored(moments, 0.001)


def test_float32_has_the_factor_where_that_is_good_enough() -> None:
    x = inputs(128, torch.Generator().manual_seed(0), 1024)
    moments = x.T @ x / len(x)
    damping = 0.01 * float(moments.diagonal().mean())
    found, exact = factor_in_float32(moments, damping), factored(moments, 0.01)
    assert found is not None
    places = exact.places
    moments.diagonal().add_(damping)
    torch.testing.assert_close(found @ found.T, moments)
    assert torch.equal(found, found.triu())
    torch.testing.assert_close((exact.factor @ exact.factor.T)[places][:, places], moments)


@pytest.mark.parametrize("spread", [1e8, torch.nan, -1.0], ids=["steep", "nan", "indefinite"])
def test_float32_says_where_it_has_no_factor(spread: float) -> None:
    """One input is so much greater than the others that these are lost beside it."""
    moments = torch.eye(64)
    direction = torch.ones(64)
    moments.addr_(direction, direction, alpha=spread)
    assert factor_in_float32(moments, 1e-3) is None


def test_float32_solves_where_that_is_good_enough() -> None:
    x = inputs(128, torch.Generator().manual_seed(0), 1024)
    metric = factored(x.T @ x / len(x), 0.01)
    right = torch.randn(128, 96, generator=torch.Generator().manual_seed(1))
    found = solved_in_float32(metric, right)
    assert found is not None
    wanted = torch.linalg.solve(metric.matrix.double(), right.double())
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    assert solved_in_float32(replace(metric, factor=metric.factor * 1.01), right) is None


def test_fewer_tokens_than_inputs_do() -> None:
    layer = trained("nf4")
    x = inputs(128, torch.Generator().manual_seed(0), 3)
    layer = replace(layer, statistics=Statistics(x.T @ x / 3, None, 3))
    assert bool(run(layer, FeedbackOptions()).isfinite().all())


def test_a_base_elsewhere_than_its_target_does_not_matter() -> None:
    """Its codes are one start among others."""
    layer = trained("nf4")
    away = BaseOnGrid(layer.base.codes.flip(0), layer.base.scales.flip(0))
    chosen = feedback(layer.target, layer.statistics, layer.encoder, PLAIN, None, away)
    assert not chosen.keeps_base


@pytest.mark.parametrize(("quant", "shape"), [("nf4", (1100, 70)), ("w4a16, group size 32", (1100, 64))])
@either_side
def test_nearest_codes_are_found_in_stretches_of_rows(
    quant: str, shape: tuple[int, int], two_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = trained(quant, shape)
    given = with_outputs(given) if two_sided else given
    moments = given.statistics.output_hessian
    outputs = None if moments is None else factored(moments, 0.1)
    metrics = factored(given.statistics.hessian, 0.01), outputs
    layer = transpose(given.target, *metrics, given.grid, given.encoder.dequantized_dtype)
    scales = greatest(layer)
    whole = torch.empty(given.target.numel(), dtype=torch.uint8)
    kernels.kernels_for(whole.device).nearest(given.target.flatten(), given.grid, scales, whole)
    sizes, nearest = [], kernels.kernels_for(whole.device).nearest

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(kernels.kernels_for(whole.device), name)

        def nearest(self, values: Tensor, grid: Grid, given: Tensor, codes: Tensor) -> None:
            sizes.append(values.numel())
            nearest(values, grid, given, codes)

    monkeypatch.setattr("streamconv.rounding.layer.kernels_for", lambda device: Counting())
    found = rounded(layer, scales)
    assert torch.equal(layer.flat(found.codes), whole)
    assert sum(sizes) == whole.numel()
    assert max(sizes) <= 512 * shape[1]
