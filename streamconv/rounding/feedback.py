"""Error feedback: codes and scales with which a layer's output changes least on calibration text.

With inputs X of N tokens and H = XᵀX / N the mean squared error of a layer's output is tr(E H Eᵀ), E = T - Q. Codes
are chosen column by column and improved by descent (`columns.py`); scales are searched first and then fitted to the
codes. The best of all that was tried is kept, so that more work is never worse in the metric of the calibration text.

The update survives to first order where errors are orthogonal to the adapter's input directions A, E Aᵀ = 0.
Preserving the delta adds these to the inputs: H' = H + μ tr(H) / ||A||² AᵀA.

With the inputs Z that the quantized layers before produce and C = XᵀZ / N, the error of the output is ||X Tᵀ - Z Qᵀ||²,
which is that of the target T + T (C - H) H⁻¹ in the metric of H = ZᵀZ / N: the asymmetric calibration of GPTAQ (Li et
al. 2025, arXiv 2504.02692), solved exactly.

Where gradients tell what an output counts for the model, G = mean of dy dyᵀ, the error is tr(G E H' Eᵀ): a Kronecker
factored approximation of the model's own loss (K-FAC, Martens and Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamconv.dtypes import Dtype
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import Grid
from streamconv.rounding.columns import descended, fed
from streamconv.rounding.layer import (
    DEVICE_ROWS,
    Layer,
    Solution,
    better,
    coded,
    errors_of,
    rounded,
    transpose,
)
from streamconv.rounding.metric import (
    STRETCH,
    Metric,
    Statistics,
    check_moments,
    compensated,
    factored,
    preserving,
)
from streamconv.rounding.residual import Residual, eased, nothing, residual
from streamconv.rounding.scales import greatest, refitted, searched
from streamconv.rounding.search import ratios_of, searched_scales, stored_scales

__all__ = ["BaseOnGrid", "FeedbackOptions", "QuantizedWeight", "ScaleEncoder", "Statistics", "feedback"]


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """Options of error feedback: how much is done, and for what.

    `damping`: of H', in units of its mean diagonal. `preserve_delta`: μ, which keeps more of the update weight by
    weight; where inputs' errors are made up for, the model's predictions are nearer without it. `sweeps`: of descent
    after each feedback. `refits`: times that scales are fitted to the codes and codes chosen anew. `asymmetry`: the
    share of the way to the target that makes up for the inputs' errors; 0 stays at T. `output_damping`: of G, likewise.
    `residual_rank`: of a weight beside the codes that repairs what errors are left; 0 for none. `searches`: nothing of
    all this; scales are searched for, errors weighed by the diagonal of H, and codes are the nearest.
    """

    damping: float = 0.001
    preserve_delta: float = 0.0
    sweeps: int = 3
    refits: int = 2
    asymmetry: float = 1.0
    output_damping: float = 0.1
    residual_rank: int = 0
    searches: bool = False

    @property
    def needs_cross(self) -> bool:
        """Whether anything is done with `Statistics.cross`."""
        return self.asymmetry != 0 and not self.searches


@dataclass(frozen=True, slots=True, eq=False)
class BaseOnGrid:
    """Base on the output's grid: codes (uint8, flat) and effective scales (float32, one a block)."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """Codes (uint8, flat) and scales (float32, one a block), for an encoder's `pack` and `finish`.

    `keeps_base`: the scales are the effective ones of the base and its side parts stay, to be given to `finish` as
    `kept`; where all codes stay too, so does the weight. `residual` is None where none was asked for.
    """

    codes: Tensor
    scales: Tensor
    keeps_base: bool
    residual: Residual | None = None


class ScaleEncoder(Protocol):
    """Members of an encoder that feedback needs; see `formats/base.py`."""

    @property
    def grid(self) -> Grid | None: ...

    @property
    def dequantized_dtype(self) -> Dtype: ...

    def effective_scales(self, scales: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Scales:
    """Scales as an encoder is given them, and as a loader will have them; `is_base` where the base has these."""

    raw: Tensor
    effective: Tensor
    is_base: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    scales: _Scales
    solution: Solution

    @property
    def loss(self) -> float:
        return self.solution.loss


def feedback(
    target: Tensor,
    statistics: Statistics,
    encoder: ScaleEncoder,
    options: FeedbackOptions,
    directions: Tensor | None = None,
    base: BaseOnGrid | None = None,
    inputs: Callable[[], Metric] | None = None,
) -> QuantizedWeight:
    """Codes and scales for `target` [out, in] (float32), the best found in the metric of H'.

    `directions` are the adapter's A [r, in]. `inputs` returns `input_metric` of these, where others have it as well.
    Errors are those of what a loader will multiply by, its cast to the
    weight's own type included. A target that equals the base keeps the base. Raises InputError where `statistics` are
    not finite or have no factor.
    """
    grid, dtype = encoder.grid, encoder.dequantized_dtype
    assert grid is not None, "feedback chooses codes, and this format has none"
    if base is not None and _is_base(target, base, grid, dtype):
        beside = nothing(target, options.residual_rank) if options.residual_rank else None
        return QuantizedWeight(base.codes, base.scales, True, beside)
    if options.searches:
        return _weighed(target, statistics.hessian, encoder, grid)
    metric = inputs() if inputs is not None else input_metric(statistics, options, directions)
    outputs = None
    if statistics.output_hessian is not None:
        outputs = factored(statistics.output_hessian, options.output_damping)
    moved = compensated(target, statistics, metric, options.asymmetry)
    layer = transpose(moved, metric, outputs, grid, dtype)
    del moved
    if not options.residual_rank:
        best = _found(layer, encoder, options, base)
        return QuantizedWeight(layer.flat(best.solution.codes), best.scales.raw, best.scales.is_base)
    flat = layer.flat(layer.target).view_as(target)
    easy = transpose(flat, *eased(metric, outputs, options.residual_rank), grid, dtype)
    del flat
    best = _found(easy, encoder, options, base)
    codes = easy.flat(best.solution.codes)
    errors = errors_of(layer, best.scales.effective, layer.transposed(codes))
    beside = residual(layer, errors, options.residual_rank)
    return QuantizedWeight(codes, best.scales.raw, best.scales.is_base, beside)


def input_metric(statistics: Statistics, options: FeedbackOptions, directions: Tensor | None) -> Metric:
    """H' and its factor: the same for all weights that share an input, unless their updates are to be preserved."""
    matrix = preserving(statistics.hessian, options.preserve_delta, directions)
    return factored(matrix, options.damping)


def _weighed(target: Tensor, hessian: Tensor, encoder: ScaleEncoder, grid: Grid) -> QuantizedWeight:
    """Nearest codes, with the scales of the least Σ H_jj e_j² found in each block."""
    check_moments(hessian)
    weights = hessian.diagonal().expand_as(target).reshape(-1)
    found = searched_scales(target.reshape(-1), grid, weights)
    if ratios_of(grid):
        found = stored_scales(target.reshape(-1), grid, found, encoder.effective_scales, weights)
    scales = _stored(encoder, found)
    codes = torch.empty(target.numel(), dtype=torch.uint8, device=target.device)
    kernels_for(target.device).nearest(target.reshape(-1), grid, scales.effective, codes)
    return QuantizedWeight(codes, scales.raw, keeps_base=False)


def metric_bytes(rows: int, columns: int, two_sided: bool) -> int:
    """Bytes of the metrics of a weight's inputs and, if `two_sided`, its outputs: moments and factor, float32."""
    return 8 * (columns**2 + two_sided * rows**2)


def working_bytes(rows: int, columns: int, two_sided: bool) -> int:
    """Bytes that `feedback` has at once where it computes, at most, beside what it is given. Measured: 21 a weight."""
    return 22 * rows * columns + metric_bytes(rows, columns, two_sided)


def device_working_bytes(rows: int, columns: int, block: int, two_sided: bool) -> int:
    """The same on a GPU, where factors are made as well, and scales are searched and fitted for many rows at once.

    Measured: 32 to 43 bytes a weight of these rows, searched; fitted, 12, and moments of a block's columns twice.
    """
    metrics = metric_bytes(rows, columns, two_sided)
    factoring = 4 * max(columns, two_sided * rows) ** 2
    at_once = min(rows, DEVICE_ROWS) * columns
    searching = 4 * rows * columns + 44 * at_once
    fitting = 5 * rows * columns + 16 * at_once + 8 * min(block, columns) * columns
    return max(working_bytes(rows, columns, two_sided), metrics + max(factoring, searching, fitting))


def factoring_bytes(rows: int, columns: int, two_sided: bool) -> int:
    """Bytes of factors in float64, on the host, while metrics are made."""
    widest = max(columns, two_sided * rows)
    return 8 * widest**2 + 16 * STRETCH * widest


def _found(
    layer: Layer, encoder: ScaleEncoder, options: FeedbackOptions, base: BaseOnGrid | None
) -> _Candidate:
    """The best of all that is tried."""
    best = min(_starts(layer, encoder, base), key=lambda each: each.loss)
    best = _polished(layer, best, options.sweeps)
    is_fitted = layer.columns % layer.grid.block == 0 and not layer.grid.order
    for _ in range(options.refits if is_fitted else 0):
        trial = _polished(layer, _refitted(layer, encoder, best), options.sweeps)
        if trial.loss >= best.loss:
            break
        best = trial
    return best


def _is_base(target: Tensor, base: BaseOnGrid, grid: Grid, dtype: Dtype) -> bool:
    values = torch.empty(target.numel(), dtype=torch.float32, device=target.device)
    kernels_for(target.device).decode(base.codes, grid, base.scales, dtype, values)
    return torch.equal(values, target.reshape(-1))


def _starts(layer: Layer, encoder: ScaleEncoder, base: BaseOnGrid | None) -> Iterator[_Candidate]:
    """Solutions with greatest magnitudes for scales, with searched ones, and with the base's own."""
    scales = _stored(encoder, greatest(layer))
    yield _Candidate(scales, rounded(layer, scales.effective))
    scales = _stored(encoder, searched(layer, encoder.effective_scales))
    nearest = rounded(layer, scales.effective)
    yield _Candidate(scales, better(layer, fed(layer, scales.effective), nearest))
    if base is not None:
        scales = _Scales(base.scales, base.scales, is_base=True)
        stays = coded(layer, base.scales, base.codes)
        yield _Candidate(scales, better(layer, fed(layer, base.scales), stays))


def _refitted(layer: Layer, encoder: ScaleEncoder, best: _Candidate) -> _Candidate:
    """Scales fitted to the codes of `best`, and either these codes or new ones."""
    scales = _stored(encoder, refitted(layer, best.scales.effective, best.solution))
    stay = coded(layer, scales.effective, layer.flat(best.solution.codes))
    return _Candidate(scales, better(layer, fed(layer, scales.effective), stay))


def _stored(encoder: ScaleEncoder, raw: Tensor) -> _Scales:
    return _Scales(raw, encoder.effective_scales(raw))


def _polished(layer: Layer, start: _Candidate, sweeps: int) -> _Candidate:
    return _Candidate(start.scales, descended(layer, start.scales.effective, start.solution, sweeps))
