"""The kernels as torch operations, for any device and any grid: what the compiled ones must equal bit for bit.

Source: bitsandbytes `backends/default/ops.py`, quantize_4bit, dequantize_4bit and int8_vectorwise_quant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.dtypes import F32, Dtype
from streamconv.kernels import offsets, ordered
from streamconv.kernels.base import SEARCH_FACTORS, SEARCH_STEPS, Start, block_dots, pairwise_sum
from streamconv.kernels.grids import (
    SMALLEST_DIVISOR,
    Grid,
    TableGrid,
    block_absmax,
    divide_by_scales,
    divided,
    empty_scales,
    multiply_by_scales,
)


@dataclass(frozen=True, slots=True)
class TorchKernels:
    """See Kernels."""

    name: str = "torch"

    def starting_scales(self, values: Tensor, grid: Grid, out: Tensor) -> Tensor:
        if grid.order:
            return ordered.starting_scales(self, values, grid, out)
        if grid.offsets is not None:
            return offsets.starting_scales(values, grid, out)
        if grid.rule is not None:
            return out.copy_(grid.rule.start(values.view(-1, grid.block)))
        out.copy_(block_absmax(values, grid.block))
        if values.numel() % grid.block:
            # Only here bitsandbytes also stores the floor: an all-zero short block has it, a whole one has 0.
            out[-1:].clamp_(min=SMALLEST_DIVISOR)
        return over_reach(out, grid)

    def ranges(self, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
        blocks = values.view(-1, block)
        is_nan = blocks.isnan().any(1)
        low, high = (each.masked_fill(is_nan, torch.nan).add_(0.0) for each in blocks.aminmax(dim=1))
        return low, high

    def nearest(self, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
        if grid.order:
            return ordered.nearest(self, values, grid, scales, codes)
        if grid.offsets is not None:
            return offsets.nearest(self, values, grid, scales, codes)
        scales = self._scales(values, grid) if scales is None else scales
        codes.copy_(grid.nearest(divide_by_scales(values, scales, grid.block, grid.peak)))
        return scales

    def search(self, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None = None) -> None:
        if grid.order:
            ordered.search(self, values, grid, scales, weights)
            return
        if grid.rule is not None:
            scales.copy_(grid.rule.fit(values, weights))
            return
        if grid.offsets is not None:
            offsets.search(self, values, grid, scales, weights)
            return
        start = self.starting_scales(values, grid, scales).clone()
        losses = self._losses(values, grid, scales, weights)

        def keep_better(trial: Tensor) -> None:
            found = self._losses(values, grid, trial, weights)
            is_better = found < losses
            scales.copy_(torch.where(is_better, trial, scales))
            losses.copy_(torch.where(is_better, found, losses))

        for factor in SEARCH_FACTORS:
            keep_better(start * factor)
        for _ in range(SEARCH_STEPS):
            levels = self._levels(values, grid, scales)
            weighed = levels if weights is None else levels * weights
            keep_better(block_dots(values, weighed, grid.block).div_(block_dots(levels, weighed, grid.block)))

    def quantize_columns(
        self,
        target: Tensor,
        pull: Tensor,
        coupling: Tensor,
        rows: Tensor | None,
        grid: Grid,
        scales: Tensor,
        dtype: Dtype,
        codes: Tensor,
        errors: Tensor,
        is_first: bool,
    ) -> None:
        factors = reciprocals(scales, grid.peak)
        parts = [slice(None)] if rows is None else [slice(i, i + 1) for i in range(target.shape[1])]
        for j in range(target.shape[0]):
            change = torch.zeros_like(target[j])
            for part in parts:
                wanted = target[j, part] + pull[j, part]
                wanted = wanted if rows is None else wanted + change[part]
                chosen = grid.nearest(wanted * factors[j, part])
                value = dequantized(chosen, grid, scales[j, part], dtype)
                if not is_first:
                    old = dequantized(codes[j, part], grid, scales[j, part], dtype)
                    is_better = (wanted - value).abs_() < (wanted - old).abs_()
                    chosen = torch.where(is_better, chosen, codes[j, part])
                    value = torch.where(is_better, value, old)
                error = target[j, part] - value
                # Two operations, here and below, as compiled loops have them: a fused one rounds once less.
                change.add_((error - errors[j, part]) * (1 if rows is None else rows[part].view(-1)))
                codes[j, part], errors[j, part] = chosen, error
            pull[j + 1 :].add_(coupling[j, j + 1 :, None] * change)

    def add_product(self, sparse: Tensor, matrix: Tensor, out: Tensor) -> None:
        for column, row in sparse.nonzero().tolist():
            out[column].add_(matrix[row] * sparse[column, row])

    def stochastic(
        self,
        values: Tensor,
        grid: Grid,
        scales: Tensor | None,
        start: Start | None,
        noise: Tensor,
        codes: Tensor,
    ) -> Tensor:
        if grid.order:
            return ordered.stochastic(self, values, grid, scales, start, noise, codes)
        if grid.offsets is not None:
            return offsets.stochastic(self, values, grid, scales, start, noise, codes)
        scales = self._scales(values, grid) if scales is None else scales
        moved = values if start is None else values - start.values
        x = divide_by_scales(moved, scales, grid.block, grid.peak)
        if start is not None:
            x.add_(grid.decode(start.codes))
        x.clamp_(*grid.limits)
        lower, upper = grid.neighbours(x)
        low = grid.decode(lower)
        gap = grid.decode(upper).sub_(low)
        goes_up = gap.mul_(noise) < x.sub_(low)
        torch.mul(upper.sub_(lower), goes_up.view(torch.uint8), out=codes).add_(lower)
        if start is not None and isinstance(grid, TableGrid) and grid.is_float:
            stays = grid.decode(codes) == grid.decode(start.codes)
            codes.copy_(torch.where(stays, start.codes, codes))
        return scales

    def uniform(self, key: int, first: int, out: Tensor) -> None:
        word = first // 2
        words = torch.arange(word, (first + out.numel() + 1) // 2, dtype=torch.int64, device=out.device)
        halves = _mixed(words.mul_(_GAMMA).add_(key))
        out.copy_(halves[first - 2 * word :][: out.numel()]).mul_(2.0**-24)

    def pack_pairs(self, codes: Tensor, out: Tensor, *, low_first: bool = False) -> None:
        high, low = (codes[1::2], codes[0::2]) if low_first else (codes[0::2], codes[1::2])
        torch.bitwise_or(high << 4, low, out=out)

    def unpack_pairs(self, packed: Tensor, codes: Tensor, *, low_first: bool = False) -> None:
        high, low = packed >> 4, packed & 0xF
        halves = torch.stack((low, high) if low_first else (high, low), dim=1)
        codes.copy_(halves.view(-1)[: codes.numel()])

    def take_columns(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        torch.index_select(matrix, 1, columns, out=out)

    def put_columns(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        out.index_copy_(1, columns.long(), matrix)

    def unpack_bits(self, packed: Tensor, bits: int, codes: Tensor) -> None:
        words = torch.zeros(packed.numel() // bits, dtype=torch.int64, device=packed.device)
        for place, column in enumerate(packed.view(-1, bits).T):
            words |= column.long() << 8 * place
        shifts = torch.arange(8, device=packed.device) * bits
        codes.view(-1, 8).copy_((words[:, None] >> shifts) & (2**bits - 1))

    def pack_bits(self, codes: Tensor, bits: int, out: Tensor) -> None:
        words = torch.zeros(codes.numel() // 8, dtype=torch.int64, device=codes.device)
        for place, column in enumerate(codes.view(-1, 8).T):
            words |= column.long() << bits * place
        for place, byte in enumerate(out.view(-1, bits).T):
            byte.copy_((words >> 8 * place & 0xFF).to(torch.uint8))

    def turn_words(self, words: Tensor, out: Tensor) -> None:
        out.copy_(words.T)

    def turn_codes(self, words: Tensor, places: tuple[int, ...], out: Tensor) -> None:
        codes = _eights(words).T.reshape(out.shape[0], -1, 8)[..., list(places)]
        out.copy_(_words(codes.contiguous()))

    def turn_codes_back(self, words: Tensor, places: tuple[int, ...], out: Tensor) -> None:
        inverse = [places.index(place) for place in range(8)]
        codes = _eights(words).view(*words.shape, 8)[..., inverse].reshape(words.shape[0], -1)
        out.copy_(_words(codes.T.reshape(out.shape[0], -1, 8).contiguous()))

    def decode(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        if grid.order:
            ordered.decode(self, codes, grid, scales, dtype, out)
            return
        if grid.offsets is not None:
            offsets.decode(self, codes, grid, scales, dtype, out)
            return
        multiply_by_scales(grid.decode(codes), scales, grid.block, out, grid.peak)
        round_to(dtype, out)

    def decode_in_steps(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        by_block, middle = out.view(-1, grid.block), len(offsets.plain(grid).values) // 2
        torch.mul(codes.view(by_block.shape), scales[:, :1] / middle, out=by_block)
        round_to(dtype, by_block)
        by_block.add_(scales[:, 1:])
        round_to(dtype, by_block)

    def decode_pairs(
        self,
        packed: Tensor,
        grid: TableGrid,
        scales: Tensor,
        dtype: Dtype,
        out: Tensor,
        *,
        low_first: bool = False,
    ) -> None:
        values = grid.decode_pairs(packed, low_first=low_first)[: out.numel()]
        multiply_by_scales(values, scales, grid.block, out, grid.peak)
        round_to(dtype, out)

    def distance(self, left: Tensor, right: Tensor, block: int) -> Tensor:
        difference = left - right
        return pairwise_sum(block_dots(difference, difference, block).double())

    def kept(
        self, codes: Tensor, grid: Grid, target: Tensor, base: Tensor, anchor: Tensor, inner: Tensor
    ) -> Tensor:
        if grid.order:
            return ordered.kept(self, codes, grid, target, base, anchor, inner)
        if grid.offsets is not None:
            return offsets.kept(self, codes, grid, target, base, anchor, inner)
        delta = target - base
        inner.copy_(block_dots(grid.decode(codes), delta, grid.block))
        sums = torch.stack([block_dots(factor, delta, grid.block) for factor in (anchor, delta)])
        return pairwise_sum(sums.double())

    def _levels(self, values: Tensor, grid: Grid, scales: Tensor) -> Tensor:
        """Values of the codes nearest to `values`, in units of their scale."""
        codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        self.nearest(values, grid, scales, codes)
        levels = grid.decode(codes)
        return levels if grid.peak == 1 else levels.mul_(1 / grid.peak)

    def _losses(self, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None) -> Tensor:
        levels = self._levels(values, grid, scales)
        error = values - multiply_by_scales(levels, scales, grid.block, levels)
        return block_dots(error, error if weights is None else error * weights, grid.block)

    def _scales(self, values: Tensor, grid: Grid) -> Tensor:
        return self.starting_scales(values, grid, empty_scales(values.numel(), grid, values.device))


def uniform_streams(keys: Sequence[int], count: int, out: Tensor) -> None:
    """Write the first `count` numbers of the streams of `keys`, one after another, as `Kernels.uniform` has each.

    `count` is even. There are a few operations for all of them, where an operation on few costs a device its launch.
    """
    words = torch.arange(count // 2, dtype=torch.int64, device=out.device).mul_(_GAMMA)
    words = words.expand(len(keys), -1).contiguous()
    for stream, key in zip(words, keys, strict=True):
        stream.add_(key)  # numbers come with the launch: a tensor of them would have to be brought
    out.copy_(_mixed(words.view(-1))[: out.numel()]).mul_(2.0**-24)


def _mixed(words: Tensor) -> Tensor:
    """Both halves of each of the counters `words` (int64) once mixed, int32 below 2²⁴; `words` are overwritten."""
    shifted = torch.empty_like(words)
    for shift, factor in _MIX:
        # torch shifts in copies of the sign; the mask makes it the logical shift of the paper.
        torch.bitwise_right_shift(words, shift, out=shifted).bitwise_and_((1 << (64 - shift)) - 1)
        words.bitwise_xor_(shifted)
        if factor != 1:
            words.mul_(factor)
    return words.view(torch.int32).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)


def over_reach(scales: Tensor, grid: Grid) -> Tensor:
    """Greatest magnitudes as starting scales, in place."""
    return scales if grid.reach == 1 else scales.copy_(divided(scales, grid.reach))


def _eights(words: Tensor) -> Tensor:
    """The codes (uint8 [n, 8 m]) of `words` (int32 [n, m]), the lowest four bits first."""
    halves = words.contiguous().view(torch.uint8)
    return torch.stack((halves & 0xF, halves >> 4), dim=-1).view(words.shape[0], -1)


def _words(codes: Tensor) -> Tensor:
    """Undo `_eights`: int32 [n, m] of uint8 [n, m, 8]."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int32).view(codes.shape[:-1])


def reciprocals(scales: Tensor, peak: float) -> Tensor:
    """Factors that bring a value to units of its scale; see `divide_by_scales`."""
    return scales.abs().clamp_(min=SMALLEST_DIVISOR * peak).copysign_(scales).reciprocal_().mul_(peak)


def dequantized(codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype) -> Tensor:
    """Values that a loader makes of `codes` with a scale each."""
    values = grid.decode(codes).mul_(scales)
    if grid.peak != 1:
        values.mul_(1 / grid.peak)
    round_to(dtype, values)
    return values


def round_to(dtype: Dtype, values: Tensor) -> None:
    """Round `values` (float32) to what `dtype` can hold, ties to even."""
    if dtype != F32:
        values.copy_(values.to(dtype.torch))


def _signed(word: int) -> int:
    """A 64-bit pattern as torch's int64 has it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
