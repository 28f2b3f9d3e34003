"""Layers to round: weights, updates and calibration statistics that are correlated as those of models are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.dtypes import DENSE
from streamconv.formats import format_of
from streamconv.formats.base import Encoder, Surveyed
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import Grid
from streamconv.rounding import ROUNDINGS, Context
from streamconv.rounding.feedback import BaseOnGrid, QuantizedWeight, Statistics

TOKENS = 2048


@dataclass(frozen=True)
class Trained:
    """A layer on the grid of `encoder`, `base`, and its update, `delta` = B A, whose A are `directions`."""

    encoder: Encoder
    grid: Grid
    base: BaseOnGrid
    values: Tensor
    delta: Tensor
    directions: Tensor
    statistics: Statistics

    @property
    def target(self) -> Tensor:
        return self.values + self.delta

    def kept(self, written: Tensor, metric: Tensor | None = None) -> float:
        """The share of the update that survives, in a metric."""
        moved, delta = written - self.values, self.delta
        weighed = delta if metric is None else delta @ metric
        return float((moved * weighed).sum() / (delta * weighed).sum())

    def nearest(self) -> Tensor:
        return self.loaded(*rounded(self.target, self.encoder), is_base=False)

    def written(self, chosen: QuantizedWeight) -> Tensor:
        return self.loaded(chosen.codes, chosen.scales, is_base=chosen.keeps_base)

    def loaded(self, codes: Tensor, scales: Tensor, *, is_base: bool) -> Tensor:
        """What a loader makes of codes and scales."""
        effective = scales if is_base else self.encoder.effective_scales(scales)
        return decoded(self.encoder, codes, effective).view_as(self.values)


def rounded(values: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    assert encoder.grid is not None
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    stored = encoder.effective_scales if encoder.rounds_scales else None
    context = Context(None, None, None, None, stored)
    return codes, ROUNDINGS["nearest"].choose(values.flatten(), encoder.grid, context, codes)


def decoded(encoder: Encoder, codes: Tensor, scales: Tensor) -> Tensor:
    assert encoder.grid is not None
    out = torch.empty(codes.numel())
    kernels_for(out.device).decode(codes, encoder.grid, scales, encoder.dequantized_dtype, out)
    return out


def inputs(count: int, generator: torch.Generator, tokens: int = TOKENS) -> Tensor:
    """Correlated ones, whose directions' sizes span a factor of 100."""
    mix = torch.randn(count, count, generator=generator) / count**0.5
    sizes = torch.logspace(0, -2, count)
    drawn: Tensor = torch.randn(tokens, count, generator=generator) * sizes @ mix
    return drawn


def trained(
    name: str = "nf4",
    shape: tuple[int, int] = (96, 128),
    size: float = 0.05,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> Trained:
    """A layer whose update is `size` times as large as it is. `name` is a format as a Weight calls it."""
    generator = torch.Generator().manual_seed(seed)
    storage_format = format_of(name)
    assert storage_format is not None
    encoder = storage_format.encoder("w.weight", shape, DENSE[dtype])
    if isinstance(encoder, Surveyed):
        encoder = encoder.knowing(0.1)
    assert encoder.grid is not None
    codes, scales = rounded(torch.randn(shape, generator=generator) * 0.02, encoder)
    base = BaseOnGrid(codes, encoder.effective_scales(scales))
    values = decoded(encoder, codes, base.scales).view(shape)
    directions = torch.randn(16, shape[1], generator=generator)
    delta = torch.randn(shape[0], 16, generator=generator) @ directions
    delta *= size * values.norm() / delta.norm()
    x = inputs(shape[1], generator)
    statistics = Statistics(x.T @ x / len(x), None, len(x))
    return Trained(encoder, encoder.grid, base, values, delta, directions, statistics)


def output_moments(count: int, seed: int = 3) -> Tensor:
    gradients = inputs(count, torch.Generator().manual_seed(seed))
    return gradients.T @ gradients / len(gradients)
