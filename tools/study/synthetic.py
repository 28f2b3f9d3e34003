"""Synthetic layers whose size of delta is known: the dead zone, what moving scales add, what feedback keeps.

A Gaussian weight W [ROWS, COLUMNS], an update D = B A of rank RANK, scaled to a given ||D|| / ||W||. Inputs of the
layer for feedback: Gaussian, in directions of their own, with a spectrum of power that falls as 1 / place; a few
single inputs are ten times as strong, as language models have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamconv.dtypes import BF16
from streamconv.formats import FORMATS
from streamconv.kernels.grids import NF4
from streamconv.rounding import ROUNDINGS, Context
from streamconv.rounding.feedback import BaseOnGrid, FeedbackOptions, Statistics, feedback
from tools.study.beds import (
    BLOCK,
    VALUES,
    OnGrid,
    delta_to_step,
    is_clamped,
    kept_share,
    nearest_codes,
    quantize,
)

ROWS, COLUMNS, RANK = 512, 512, 16
SIZES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.16, 0.2, 0.25, 0.3, 0.4)
SEEDS = (0, 1, 2, 3, 4)
AT_SIZE, CALIBRATION_ROWS, HELD_OUT_ROWS, STRONG_INPUTS = 0.05, 8192, 2048, 5


@dataclass(frozen=True, slots=True)
class Synthetic:
    """One layer: W, its nf4-dq form, D and the factor A [RANK, COLUMNS] it came from."""

    weight: Tensor
    base: OnGrid
    delta: Tensor
    directions: Tensor

    @property
    def target(self) -> Tensor:
        return self.base.values + self.delta


def make(size: float, seed: int) -> Synthetic:
    """A layer with ||D|| / ||W|| = `size`; W is in bfloat16, as stored ones are."""
    generator = torch.Generator().manual_seed(seed)
    weight = (0.02 * torch.randn(ROWS, COLUMNS, generator=generator)).bfloat16().float()
    A = torch.randn(RANK, COLUMNS, generator=generator)
    delta = torch.randn(ROWS, RANK, generator=generator) @ A
    return Synthetic(weight, quantize(weight), delta * (size * weight.norm() / delta.norm()), A)


def dead_zone() -> list[dict[str, Any]]:
    """For every size: the kept share by target and rounding, codes changed, mean and standard deviation over SEEDS."""
    return [{"size": size, **_over_seeds([_shares(size, seed) for seed in SEEDS])} for size in SIZES]


def _shares(size: float, seed: int) -> dict[str, float]:
    layer = make(size, seed)
    base, delta = layer.base, layer.delta
    nearest, of_f = quantize(layer.target), quantize(layer.weight + delta)
    still = nearest_codes(layer.target, base.scales)
    moved, moved_alone = nearest.codes != base.codes, still != base.codes
    return {
        "ratio": delta_to_step(delta, base),
        "nearest_T": kept_share(nearest.values, base.values, delta),
        "nearest_T_on_fixed_scales": kept_share(_values(still, base.scales), base.values, delta),
        "nearest_F": kept_share(of_f.values, layer.weight, delta),
        "stochastic_T": kept_share(_values(_stochastic(layer, seed), base.scales), base.values, delta),
        "changed": moved.float().mean().item(),
        "changed_on_fixed_scales": moved_alone.float().mean().item(),
        "dragged": (moved & ~moved_alone).float().mean().item(),
        "clamped": is_clamped(layer.target, base.scales).float().mean().item(),
    }


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    return VALUES[codes.long()] * scales


def _stochastic(layer: Synthetic, seed: int) -> Tensor:
    """Codes by streamconv's own stochastic rounding."""
    noise = torch.rand(ROWS * COLUMNS, generator=torch.Generator().manual_seed(1000 + seed))
    base = layer.base
    scales = base.scales.flatten()[::BLOCK].contiguous()
    context = Context(base.codes.flatten(), scales, base.values.flatten(), noise)
    codes = torch.empty(ROWS * COLUMNS, dtype=torch.uint8)
    ROUNDINGS["stochastic"].choose(layer.target.flatten(), NF4, context, codes)
    return codes.view(ROWS, COLUMNS)


def compensated() -> Mapping[str, Mapping[str, float]]:
    """At `AT_SIZE`: kept delta, by weight and by output, and relative output error on held-out inputs, by strategy."""
    found = [_strategies(seed) for seed in SEEDS]
    return {name: _over_seeds([each[name] for each in found]) for name in found[0]}


def _strategies(seed: int) -> dict[str, dict[str, float]]:
    layer = make(AT_SIZE, seed)
    inputs = _inputs(seed)
    calibration, held_out = inputs[:CALIBRATION_ROWS], inputs[CALIBRATION_ROWS:]
    results = {
        "nearest": quantize(layer.target).values,
        "stochastic": _values(_stochastic(layer, seed), layer.base.scales),
        "feedback": _feedback(layer, calibration, FeedbackOptions()),
        "feedback, delta term": _feedback(layer, calibration, FeedbackOptions(preserve_delta=0.3)),
    }
    return {name: _scores(layer, values, held_out) for name, values in results.items()}


def _inputs(seed: int) -> Tensor:
    """[CALIBRATION_ROWS + HELD_OUT_ROWS, COLUMNS]: inputs that depend on each other, a few of them strong."""
    generator = torch.Generator().manual_seed(100 + seed)
    turn: Tensor = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    spectrum = (1 / torch.arange(1, COLUMNS + 1)).sqrt()
    latent = torch.randn(CALIBRATION_ROWS + HELD_OUT_ROWS, COLUMNS, generator=generator)
    inputs = latent * spectrum @ turn
    strong = torch.randperm(COLUMNS, generator=generator)[:STRONG_INPUTS]
    inputs[:, strong] *= 10
    return inputs


def _feedback(layer: Synthetic, inputs: Tensor, options: FeedbackOptions) -> Tensor:
    """Values that `feedback` chooses for the target, in nf4-dq."""
    encoder = FORMATS["nf4-dq"].encoder("synthetic", (ROWS, COLUMNS), BF16)
    statistics = Statistics(inputs.T @ inputs / len(inputs), None, len(inputs))
    base = BaseOnGrid(layer.base.codes.flatten(), layer.base.scales.flatten()[::BLOCK].contiguous())
    chosen = feedback(layer.target, statistics, encoder, options, layer.directions, base)
    scales = chosen.scales if chosen.keeps_base else encoder.effective_scales(chosen.scales)
    return _values(chosen.codes.view(ROWS, COLUMNS), scales.repeat_interleave(BLOCK).view(ROWS, COLUMNS))


def _scores(layer: Synthetic, values: Tensor, inputs: Tensor) -> dict[str, float]:
    change, wanted = inputs @ (values - layer.base.values).T, inputs @ layer.delta.T
    error = inputs @ (values - layer.target).T
    return {
        "kept": kept_share(values, layer.base.values, layer.delta),
        "kept_in_outputs": ((change * wanted).sum() / wanted.square().sum()).item(),
        "output_error": (error.norm() / (inputs @ layer.target.T).norm()).item(),
    }


def _over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation of every number."""
    return {
        key: {
            "mean": float(np.mean([each[key] for each in found])),
            "sd": float(np.std([each[key] for each in found], ddof=1)),
        }
        for key in found[0]
    }
