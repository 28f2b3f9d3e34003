"""Grids: the values a code may stand for, and which code lies nearest a number.

A grid is one-dimensional and fixed: the values of its codes, and a block size. Consecutive elements of a
flattened weight share one float32 scale, `block` at a time; the last block may be short. `peak` is the value that
stands for the scale itself, so an element is `decode(code) * scale / peak`. A block of ROW elements is a whole row.

Roundings and the treatment of scales are those of bitsandbytes (`backends/default/ops.py`, quantize_4bit and
int8_vectorwise_quant).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

# bitsandbytes' floor for a scale it divides by: an all-zero block then divides 0 by this and not by 0.
SMALLEST_DIVISOR = 1e-38
# As a grid's `block`: all of a row. Only the grid of a format has it; that of a weight, whose rows are known, does not.
ROW = 0
_PAIRED = 16  # values of a grid whose codes are stored two a byte


class Offsets(Protocol):
    """Rule of nearest rounding for the offsets of blocks, beside their scales; see `kernels/offsets.py`. Plain data.

    A block's offset is the value of code 0.
    """

    def start(self, values: Tensor) -> Tensor:
        """Scale and offset, in units of the grid, of every block of `values` [blocks, block]: [blocks, 2]."""


class ScaleRule(Protocol):
    """Rules of a grid for scales, in place of greatest magnitudes and of the search for any grid's. Plain data.

    Scales are in units of the grid: float32, one a block, with offsets [blocks, 2].
    """

    def start(self, values: Tensor) -> Tensor:
        """Scales of nearest rounding for `values` [blocks, block]."""

    def fit(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Scales with the least squared error found for flat `values`, weighed by `weights`, as many."""


class Grid(Protocol):
    """Codes are uint8; values and `x` float32, in units of `scale / peak`. Plain data: grids compare."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int:
        """Elements that share a scale."""

    @property
    def peak(self) -> float: ...

    @property
    def reach(self) -> float:
        """Grid position that nearest rounding gives a block's greatest magnitude."""

    @property
    def offsets(self) -> Offsets | None:
        """Rule for offsets, where every block has one of its own, and scales are [blocks, 2]; None: there are none."""

    @property
    def rule(self) -> ScaleRule | None:
        """Rules for scales, of a grid that has its own."""

    @property
    def order(self) -> bytes:
        """Columns (int32) as they follow each other in blocks, where that is not the weight's own order."""

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value that is ever chosen."""

    def of_width(self, columns: int) -> Grid:
        """The grid of a weight with `columns`, where the block is a whole row; else itself."""

    def prepare(self, device: torch.device) -> None:
        """Make the tables on `device`, once for all grids with these values: it is waited for, and a cell need not."""

    def nearest(self, x: Tensor) -> Tensor:
        """Codes of the values nearest to `x`; beyond the limits, the limit's code."""

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the greatest value ≤ `x` and of the least value ≥ `x`.

        Both are the same code where `x` is a value of the grid, and where it lies beyond the limits.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes`."""


@dataclass(frozen=True, slots=True)
class TableGrid:
    """`values[code]` for every code, at most 256, in any order, from -1 to 1.

    A code changes at the float32 midpoint of neighbouring values; a number exactly on one gets the lower value.
    `reach` is where the scale of nearest rounding puts a block's greatest magnitude: at 1, an end of the grid, or
    beyond an end that is nearer to 0 than the other one. `is_float`: the codes are the bits of a float, and are treated
    as such: a number exactly between two values gets the even code; and an update of 0 leaves -0 what it is.
    `scale_ratios`: to the scale of nearest rounding, of those that a search tries once more as a file can hold them.
    """

    name: str
    values: tuple[float, ...]
    block: int
    peak: float = 1.0
    reach: float = 1.0
    offsets: Offsets | None = None
    rule: ScaleRule | None = None
    order: bytes = b""
    is_float: bool = False
    scale_ratios: tuple[float, ...] = ()

    def of_block(self, block: int) -> Self:
        """The same values, with another number of elements to a scale."""
        return dataclasses.replace(self, block=block)

    def of_width(self, columns: int) -> Self:
        """The grid of a weight with `columns`: its block is known."""
        return self.of_block(columns) if self.block == ROW else self

    def prepare(self, device: torch.device) -> None:
        """See Grid."""
        self.tables(device)
        if len(self.values) == _PAIRED:
            for low_first in (False, True):
                _pairs(self.values, device, low_first)

    def tables(self, device: torch.device) -> Tables:
        """Tables of the values, made once for every device."""
        return tables_of(self.values, device, self.is_float)

    @property
    def limits(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def nearest(self, x: Tensor) -> Tensor:
        """See Grid."""
        tables = self.tables(x.device)
        return tables.by_rank(tables.midpoints.count_below(x))

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See Grid."""
        tables = self.tables(x.device)
        x = x.clamp(tables.least, tables.greatest)
        upper = tables.distinct.count_below(x)
        is_above = _look_up(tables.distinct.thresholds, upper) > x
        lower = upper - is_above.view(torch.uint8)
        return tables.by_rank(lower), tables.by_rank(upper)

    def decode(self, codes: Tensor) -> Tensor:
        """See Grid."""
        return _look_up(self.tables(codes.device).values, codes)

    def decode_pairs(self, packed: Tensor, *, low_first: bool = False) -> Tensor:
        """Values (float32, flat) of 4-bit codes stored two a byte (uint8, flat), the first one high or low."""
        pairs = _pairs(self.values, packed.device, low_first)
        return pairs.index_select(0, packed.to(torch.int32)).view(torch.float32)


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """The integers from `-peak` to `peak`, as 8-bit two's complement; halves are rounded to even."""

    name: str
    peak: float
    block: int
    reach: float = 1.0
    offsets: None = None
    rule: None = None
    order: bytes = b""

    @property
    def limits(self) -> tuple[float, float]:
        return -self.peak, self.peak

    def of_width(self, columns: int) -> Self:
        """The grid of a weight with `columns`: its block is known."""
        return dataclasses.replace(self, block=columns) if self.block == ROW else self

    def prepare(self, device: torch.device) -> None:
        """See Grid; there are none."""

    def nearest(self, x: Tensor) -> Tensor:
        """See Grid."""
        return self._codes(x.round())

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See Grid."""
        return self._codes(x.floor()), self._codes(x.ceil())

    def decode(self, codes: Tensor) -> Tensor:
        """See Grid."""
        return codes.view(torch.int8).float()

    def _codes(self, integers: Tensor) -> Tensor:
        return integers.clamp_(*self.limits).to(torch.int8).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class DecodedGrid:
    """Values of weights that were quantized elsewhere: integers less a zero point that each block has of its own, or
    scales in other blocks than runs of a row. They are decoded; nothing is rounded to such a grid.

    Scales are cut into blocks of `block` elements, whatever there is of them for one.
    """

    name: str
    block: int
    peak: float = 1.0
    reach: float = 1.0
    offsets: None = None
    rule: None = None
    order: bytes = b""

    @property
    def limits(self) -> tuple[float, float]:
        return -15.0, 15.0

    def of_width(self, columns: int) -> Self:
        del columns  # blocks are known
        return self

    def prepare(self, device: torch.device) -> None:
        """See Grid; there are none."""

    def nearest(self, x: Tensor) -> Tensor:
        raise self._refusal(x)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise self._refusal(x)

    def decode(self, codes: Tensor) -> Tensor:
        raise self._refusal(codes)

    def _refusal(self, given: Tensor) -> AssertionError:
        return AssertionError(
            f"{self.name}: a code means something in its block only ({given.numel()} given)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
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
        """Count the thresholds less than each of `x`: uint8, of the same shape."""
        if not self.bins:
            known = x.nan_to_num(nan=-1.0)  # NaN would count as above all
            return torch.bucketize(known, self.thresholds, out_int32=True).to(torch.uint8)
        index = _bin(x, self.bins).reshape(-1)
        count = self.lower.index_select(0, index).view(x.shape)
        return count.add_((x > self.own.index_select(0, index).view(x.shape)).view(torch.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """A grid's values on one device; a rank is a place among the distinct values in rising order."""

    values: Tensor
    codes: Tensor
    codes_are_ranks: bool
    midpoints: Steps
    distinct: Steps
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


def _steps(thresholds: Tensor) -> Steps:
    for bins in (16, 32, 64, 128, 256, 512, 1024):
        index = _bin(thresholds, bins)
        if len(set(index.tolist())) == thresholds.numel():
            all_bins = torch.arange(bins + 1, device=thresholds.device, dtype=torch.int32)
            lower = torch.bucketize(all_bins, index).to(torch.uint8)
            own = torch.full((bins + 1,), torch.inf, device=thresholds.device)
            own[index] = thresholds
            return Steps(thresholds, bins, lower, own)
    nothing = thresholds[:0]
    return Steps(thresholds, 0, nothing, nothing)


@functools.cache
def tables_of(values: tuple[float, ...], device: torch.device, is_float: bool = False) -> Tables:
    """The tables of a TableGrid with `values`, made once for every device."""
    table = torch.tensor(values, dtype=torch.float32, device=device)
    rising, codes = torch.sort(table, stable=True)
    # Two codes may share a value (0 and -0 of fp4): the first one stands for both.
    is_new = torch.ones_like(rising, dtype=torch.bool)
    is_new[1:] = rising[1:] > rising[:-1]
    rising, codes = rising[is_new], codes[is_new].to(torch.uint8)
    midpoints = (rising[:-1] + rising[1:]) / 2
    if is_float:  # the least float below: what lies on the midpoint itself is then above it
        below = midpoints.nextafter(torch.full_like(midpoints, -torch.inf))
        midpoints = torch.where(codes[1:] % 2 == 0, below, midpoints)
    return Tables(
        values=table,
        codes=codes,
        codes_are_ranks=codes.tolist() == list(range(len(codes))),
        midpoints=_steps(midpoints),
        distinct=_steps(rising),
        # These two ask the device, so all is there when the tables are found in the cache, in whatever stream.
        least=float(rising[0]),
        greatest=float(rising[-1]),
    )


@functools.cache
def _pairs(values: tuple[float, ...], device: torch.device, low_first: bool) -> Tensor:
    """Both values of every byte of two 4-bit codes as one 8-byte item, copied and never computed with."""
    table = torch.tensor(values, dtype=torch.float32)
    high = table.repeat_interleave(16)
    low = table.repeat(16)
    # Copied when it is complete: whoever finds it in the cache may be in another stream of the device.
    return torch.stack((low, high) if low_first else (high, low), dim=1).view(torch.int64).view(-1).to(device)


def empty_scales(count: int, grid: Grid, device: torch.device) -> Tensor:
    """Memory for the scales of so many elements: an entry a block, of two numbers where blocks have offsets."""
    blocks = -(-count // grid.block)
    shape = (blocks,) if grid.offsets is None else (blocks, 2)
    return torch.empty(shape, dtype=torch.float32, device=device)


def block_absmax(values: Tensor, block: int) -> Tensor:
    """Greatest magnitude of every block of `values` (float32, flat): one a block; NaN if one is."""
    whole = values.numel() - values.numel() % block
    scales = values[:whole].view(-1, block).abs().amax(dim=1)
    if whole == values.numel():
        return scales
    return torch.cat((scales, values[whole:].abs().amax().view(1)))


def multiply_by_scales(values: Tensor, scales: Tensor, block: int, out: Tensor, peak: float = 1.0) -> Tensor:
    """Write `values`, in units of their block's `scale / peak`, to `out` (all float32, flat); return it."""
    whole = values.numel() - values.numel() % block
    torch.mul(values[:whole].view(-1, block), scales[: whole // block, None], out=out[:whole].view(-1, block))
    if whole < values.numel():
        torch.mul(values[whole:], scales[-1], out=out[whole:])
    return out if peak == 1 else out.mul_(1 / peak)


def divided(values: Tensor, number: float) -> Tensor:
    """`values` / `number`, rounded once, as on a CPU.

    By a number, CUDA multiplies with its reciprocal (torch's `BinaryDivTrueKernel.cu`); by a tensor there, it divides.
    """
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


def divide_by_scales(values: Tensor, scales: Tensor, block: int, peak: float = 1.0) -> Tensor:
    """`values` in units of their block's `scale / peak` (all float32, flat), rounded as bitsandbytes rounds them.

    That is: whole blocks times the float32 reciprocal, itself times `peak` first; a short last block by division.
    Scales of magnitude under `SMALLEST_DIVISOR * peak` count as that, so that no reciprocal is infinite.
    """
    whole = values.numel() - values.numel() % block
    divisors = scales.abs().clamp_(min=SMALLEST_DIVISOR * peak).copysign_(scales)
    out = torch.empty_like(values)
    reciprocals = divisors[: whole // block, None].reciprocal().mul_(peak)
    torch.mul(values[:whole].view(-1, block), reciprocals, out=out[:whole].view(-1, block))
    if whole < values.numel():
        torch.div(values[whole:], divisors[-1], out=out[whole:]).mul_(peak)
    return out


def code_steps(grid: Grid) -> Tensor:
    """Mean of the gaps beside a code's value, at an end the one gap, by code: float32, in units of `scale / peak`."""
    if not isinstance(grid, TableGrid):
        return torch.ones(256)  # integers
    values = torch.tensor(grid.values, dtype=torch.float64)
    rising = torch.tensor(sorted(set(grid.values)), dtype=torch.float64)
    gaps = rising.diff()
    steps = (torch.cat((gaps[:1], gaps)) + torch.cat((gaps, gaps[-1:]))) / 2
    return steps[torch.searchsorted(rising, values)].float()


# The 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E), in float32.
NF4 = TableGrid(
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
FP4 = TableGrid(
    "fp4",
    tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
    block=64,
)


def integers(name: str, bits: int, block: int) -> TableGrid:
    """The integers of so many bits, two's complement, as files of groups store them: code c is c - 2^(bits - 1).

    In units of 2^(bits - 1), a power of two, so that nothing is rounded where the scale is a multiple of the stored
    one. The scale of nearest rounding is compressed-tensors' (`quantization/utils/helpers.py`, calculate_qparams): the
    greatest magnitude lies in the middle between the two ends' magnitudes.
    """
    half = 2 ** (bits - 1)
    return TableGrid(
        name, tuple((code - half) / half for code in range(2 * half)), block, reach=(half - 0.5) / half
    )


# Signed integers with a scale for every group of a row, as GPTQ and compressed-tensors have them.
INT4 = integers("int4", bits=4, block=128)
INT8_GROUPS = integers("int8 in groups", bits=8, block=128)

# The 4-bit float of the OCP Microscaling specification (v1.0, table 5), of greatest magnitude 6. In units of 8, a power
# of two, so that nothing is rounded where the scale is 8 times the stored one.
E2M1_UNIT = 8.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = TableGrid(
    "e2m1",
    tuple(sign * value / E2M1_UNIT for sign in (1, -1) for value in _E2M1),
    block=16,
    reach=6 / E2M1_UNIT,
    is_float=True,
)


def _e4m3_value(code: int) -> float:
    """Number that a byte stands for; for the two that are NaN, the greatest of their sign, which other codes have."""
    exponent, mantissa = code >> 3 & 15, min(code & 7, 6 if code & 0x78 == 0x78 else 7)
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if code & 0x80 else size


# The 8-bit float E4M3 without infinities (Micikevicius et al. 2022, arXiv 2209.05433), of greatest magnitude 448. In
# units of 512, a power of two, so that nothing is rounded where the scale is 512 times the stored one.
E4M3_UNIT = 512.0
E4M3 = TableGrid(
    "e4m3",
    tuple(_e4m3_value(code) / E4M3_UNIT for code in range(256)),
    block=ROW,
    reach=448 / E4M3_UNIT,
    is_float=True,
)

# LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339, §2): -128 is a code that is read, but never chosen.
INT8 = IntegerGrid("int8", peak=127.0, block=ROW)
