"""Grids: the values a code may stand for, and which code lies nearest a number.

A grid is one-dimensional and fixed: a table of values between -1 and 1, and a block size. Consecutive
elements of a flattened weight share one float32 scale, `block` at a time; the last block may be short. An
element's value is `values[code] * scale`.

Thresholds and the treatment of scales are those of bitsandbytes (`backends/default/ops.py`, quantize_4bit): a
code changes at the float32 midpoint of neighbouring values, a number exactly on one gets the lower value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# bitsandbytes' floor for a scale it divides by: an all-zero block then divides 0 by this and not by 0.
SMALLEST_DIVISOR = 1e-38


@dataclass(frozen=True, slots=True)
class Grid:
    """`values[code]` for every code, at most 256, in any order; `block` elements share a scale."""

    name: str
    values: tuple[float, ...]
    block: int

    def nearest(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the values nearest to `x` (float32); beyond the ends, the end's code."""
        tables = _tables(self.values, x.device)
        return tables.by_rank(tables.midpoints.count_below(x))

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (uint8) of the greatest value ≤ `x` and of the least value ≥ `x` (float32).

        Both are the same code where `x` is a value of the grid, and where it lies beyond the ends.
        """
        tables = _tables(self.values, x.device)
        x = x.clamp(tables.least, tables.greatest)
        upper = tables.distinct.count_below(x)
        is_above = _look_up(tables.distinct.thresholds, upper) > x
        lower = upper - is_above.view(torch.uint8)
        return tables.by_rank(lower), tables.by_rank(upper)

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of `codes` (uint8)."""
        return _look_up(_tables(self.values, codes.device).values, codes)

    def decode_pairs(self, packed: Tensor) -> Tensor:
        """Values (float32, flat) of 4-bit codes stored two a byte (uint8, flat), the first one high."""
        pairs = _pairs(self.values, packed.device)
        return pairs.index_select(0, packed.to(torch.int32)).view(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Sorted thresholds, and a way to count those below a number without searching.

    The interval [-1, 1] is cut into bins so narrow that none holds two thresholds. A bin knows how many
    thresholds lie in lower bins, and its own; one comparison with that decides. Exact, because the bin of a
    number never falls as the number grows: it is computed with one rounding. (About eight times as fast on a
    CPU as the binary search of torch.bucketize, which stands in where thresholds crowd too closely.)
    """

    thresholds: Tensor
    bins: int
    lower: Tensor
    own: Tensor

    def count_below(self, x: Tensor) -> Tensor:
        """How many thresholds are less than each of `x`: uint8, of the same shape."""
        if not self.bins:
            known = x.nan_to_num(nan=-1.0)  # NaN would count as above all
            return torch.bucketize(known, self.thresholds, out_int32=True).to(torch.uint8)
        index = _bin(x, self.bins).reshape(-1)
        count = self.lower.index_select(0, index).view(x.shape)
        return count.add_((x > self.own.index_select(0, index).view(x.shape)).view(torch.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """A grid's values on one device; a rank is a place among the distinct values in rising order."""

    values: Tensor
    codes: Tensor
    codes_are_ranks: bool
    midpoints: _Steps
    distinct: _Steps
    least: float
    greatest: float

    def by_rank(self, ranks: Tensor) -> Tensor:
        return ranks if self.codes_are_ranks else _look_up(self.codes, ranks)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape)


def _bin(x: Tensor, bins: int) -> Tensor:
    half = bins // 2
    # NaN converts to any integer; the second clamp keeps it inside the table.
    return x.clamp(-1.0, 1.0).mul_(half).add_(half).to(torch.int32).clamp_(0, bins)


def _steps(thresholds: Tensor) -> _Steps:
    for bins in (16, 32, 64, 128, 256, 512, 1024):
        index = _bin(thresholds, bins)
        if len(set(index.tolist())) == thresholds.numel():
            all_bins = torch.arange(bins + 1, device=thresholds.device, dtype=torch.int32)
            lower = torch.bucketize(all_bins, index).to(torch.uint8)
            own = torch.full((bins + 1,), torch.inf, device=thresholds.device)
            own[index] = thresholds
            return _Steps(thresholds, bins, lower, own)
    nothing = thresholds[:0]
    return _Steps(thresholds, 0, nothing, nothing)


@functools.cache
def _tables(values: tuple[float, ...], device: torch.device) -> _Tables:
    table = torch.tensor(values, dtype=torch.float32, device=device)
    rising, codes = torch.sort(table, stable=True)
    # Two codes may share a value (0 and -0 of fp4): the first one stands for both.
    is_new = torch.ones_like(rising, dtype=torch.bool)
    is_new[1:] = rising[1:] > rising[:-1]
    rising, codes = rising[is_new], codes[is_new].to(torch.uint8)
    return _Tables(
        values=table,
        codes=codes,
        codes_are_ranks=codes.tolist() == list(range(len(codes))),
        midpoints=_steps((rising[:-1] + rising[1:]) / 2),
        distinct=_steps(rising),
        least=float(rising[0]),
        greatest=float(rising[-1]),
    )


@functools.cache
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Both values of every byte of two 4-bit codes as one 8-byte item, copied and never computed with."""
    table = torch.tensor(values, dtype=torch.float32, device=device)
    high = table.repeat_interleave(16)
    low = table.repeat(16)
    return torch.stack((high, low), dim=1).view(torch.int64).view(-1)


def block_absmax(values: Tensor, block: int) -> Tensor:
    """Greatest magnitude of every block of `values` (float32, flat): one a block; NaN if one is."""
    whole = values.numel() - values.numel() % block
    scales = values[:whole].view(-1, block).abs().amax(dim=1)
    if whole == values.numel():
        return scales
    return torch.cat((scales, values[whole:].abs().amax().view(1)))


def multiply_by_scales(values: Tensor, scales: Tensor, block: int, out: Tensor) -> Tensor:
    """Write `values` times the scale of their block to `out` (all float32, flat); return it."""
    whole = values.numel() - values.numel() % block
    torch.mul(values[:whole].view(-1, block), scales[: whole // block, None], out=out[:whole].view(-1, block))
    if whole < values.numel():
        torch.mul(values[whole:], scales[-1], out=out[whole:])
    return out


def divide_by_scales(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """`values` in units of their block's scale (all float32, flat), rounded as bitsandbytes rounds them.

    That is: whole blocks times the float32 reciprocal, a short last block by division; scales of magnitude
    under `SMALLEST_DIVISOR` count as that.
    """
    whole = values.numel() - values.numel() % block
    divisors = scales.abs().clamp_(min=SMALLEST_DIVISOR).copysign_(scales)
    out = torch.empty_like(values)
    reciprocals = divisors[: whole // block, None].reciprocal()
    torch.mul(values[:whole].view(-1, block), reciprocals, out=out[:whole].view(-1, block))
    if whole < values.numel():
        torch.div(values[whole:], divisors[-1], out=out[whole:])
    return out


# The 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E), in float32.
NF4 = Grid(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    block=64,
)

# The 4-bit float of bitsandbytes (`functional.py`, get_4bit_type), in the order of its bit patterns. It is not E2M1.
FP4 = Grid(
    "fp4",
    tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
    block=64,
)
