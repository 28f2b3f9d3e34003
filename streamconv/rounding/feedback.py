"""Error feedback: codes and scales with which a layer's output changes least on calibration text.

With inputs X of N tokens and H = XᵀX / N the mean squared error of a layer's output is tr(E H Eᵀ), E = T - Q. Codes are
chosen column by column (`columns.py`), then lowered by descent; scales are searched first (`search.py`) and then fitted to
the codes. The best of all that was tried is kept, so that more work is never worse in the metric of the calibration text.

The update survives to first order where errors are orthogonal to the adapter's input directions A, E Aᵀ = 0. Preserving
the delta adds these to the inputs: H' = H + μ tr(H) / ||A||² AᵀA.

With the inputs Z that the quantized layers before produce and C = XᵀZ / N, the error of the output is ||X Tᵀ - Z Qᵀ||²,
which is that of the target T + T (C - H) H⁻¹ in the metric of H = ZᵀZ / N: the asymmetric calibration of GPTAQ (Li et
al. 2025, arXiv 2504.02692), solved exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamconv.dtypes import Dtype
from streamconv.grids import Grid
from streamconv.kernels import kernels_for
from streamconv.rounding.columns import (
    Layer,
    Solution,
    better_rows,
    descended,
    fed,
    refitted,
    rounded,
    turn,
)
from streamconv.rounding.metric import Statistics, compensated, metric

__all__ = ["BaseOnGrid", "Chosen", "FeedbackOptions", "Statistics", "Storage", "feedback"]


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """How much is done, and for what.

    `damping`: of H', in units of its mean diagonal. `preserve_delta`: μ. `sweeps`: of descent after each feedback.
    `refits`: times that scales are fitted to the codes and codes chosen anew. `asymmetry`: the share of the way to the
    target that makes up for the inputs' errors; 0 stays at T.
    """

    damping: float = 0.01
    preserve_delta: float = 1.0
    sweeps: int = 3
    refits: int = 2
    asymmetry: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class BaseOnGrid:
    """Where the base lies on the output's grid: codes (uint8, flat) and effective scales (float32, one a block)."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Codes (uint8, flat) and scales (float32, one a block), for an encoder's `pack` and `finish`.

    `keeps_base`: the scales are the effective ones of the base and its side parts stay, to be given to `finish` as
    `kept`; where all codes stay too, so does the weight.
    """

    codes: Tensor
    scales: Tensor
    keeps_base: bool


class Storage(Protocol):
    """What has to be known of an encoder; see `formats/base.py`."""

    @property
    def grid(self) -> Grid | None: ...

    @property
    def dequantized_dtype(self) -> Dtype: ...

    def effective_scales(self, scales: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A solution, and its scales as they were given to the encoder."""

    solution: Solution
    raw: Tensor
    keeps_base: bool = False

    @property
    def loss(self) -> float:
        return self.solution.loss


def feedback(
    target: Tensor,
    statistics: Statistics,
    encoder: Storage,
    options: FeedbackOptions,
    directions: Tensor | None = None,
    base: BaseOnGrid | None = None,
) -> Chosen:
    """Codes and scales for `target` [out, in] (float32), the best found in the metric of H'.

    `directions` are the adapter's A [r, in]. Errors are those of what a loader will multiply by, its cast to the
    weight's own type included. A target that equals the base keeps the base. Raises InputError where `statistics` are
    not finite or have no factor.
    """
    grid = encoder.grid
    assert grid is not None, "feedback chooses codes, and this format has none"
    if base is not None and _is_base(target, base, grid, encoder.dequantized_dtype):
        return Chosen(base.codes, base.scales, keeps_base=True)
    found = metric(statistics, options.damping, options.preserve_delta, directions)
    layer = turn(
        compensated(target, statistics, found, options.asymmetry), found, grid, encoder.dequantized_dtype
    )
    best = _polished(layer, min(_starts(layer, encoder, base), key=lambda each: each.loss), options.sweeps)
    for _ in range(options.refits if layer.columns % grid.block == 0 else 0):
        raw = refitted(layer, best.solution)
        start = _Candidate(fed(layer, encoder.effective_scales(raw)), raw)
        trial = _polished(layer, start, options.sweeps)
        if trial.loss >= best.loss:
            break
        best = trial
    return Chosen(layer.flat(best.solution.codes), best.raw, best.keeps_base)


def _is_base(target: Tensor, base: BaseOnGrid, grid: Grid, dtype: Dtype) -> bool:
    values = torch.empty(target.numel(), dtype=torch.float32, device=target.device)
    kernels_for(target.device).decode(base.codes, grid, base.scales, dtype, values)
    return torch.equal(values, target.reshape(-1))


def _starts(layer: Layer, encoder: Storage, base: BaseOnGrid | None) -> list[_Candidate]:
    """Solutions with greatest magnitudes for scales, with searched ones, and with the base's own."""
    kernels, target = kernels_for(layer.target.device), layer.flat(layer.target)
    weights = layer.metric.matrix.diagonal()[layer.metric.places].repeat(layer.rows)
    absmax = torch.empty(-(-target.numel() // layer.grid.block), dtype=torch.float32, device=target.device)
    kernels.absmax(target, layer.grid.block, absmax)
    starts = [_Candidate(rounded(layer, encoder.effective_scales(absmax)), absmax)]
    searched = torch.empty_like(absmax)
    kernels.search(target, layer.grid, weights, searched)
    effective = encoder.effective_scales(searched)
    starts.append(_Candidate(better_rows(fed(layer, effective), rounded(layer, effective)), searched))
    if base is not None:
        kept = rounded(layer, base.scales, layer.turned(base.codes))
        solution = better_rows(fed(layer, base.scales), kept)
        starts.append(_Candidate(solution, base.scales, keeps_base=True))
    return starts


def _polished(layer: Layer, start: _Candidate, sweeps: int) -> _Candidate:
    solution = start.solution
    for _ in range(sweeps):
        solution = descended(layer, solution)
    return _Candidate(solution, start.raw, start.keeps_base)
