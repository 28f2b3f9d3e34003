"""The kernels compiled by numba: tensors in, `loops.py` over their whole blocks, the same bits as the torch ones.

What comes up once a weight or never, the short block at its end and grids with other blocks, is left to torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from streamconv.dtypes import BF16, F16, F32, Dtype
from streamconv.kernels import column_loops, loops, offset_loops, offsets, ordered
from streamconv.kernels.base import SEARCH_FACTORS, SEARCH_STEPS, Start, block_dots
from streamconv.kernels.e2m1_loops import LOOPS as E2M1_LOOPS
from streamconv.kernels.e2m1_loops import BlockLoops
from streamconv.kernels.grids import (
    E2M1,
    E4M3,
    SMALLEST_DIVISOR,
    Grid,
    IntegerGrid,
    TableGrid,
    empty_scales,
    tables_of,
)
from streamconv.kernels.in_torch import TorchKernels, over_reach, round_to
from streamconv.kernels.loops import Array

# The block of bitsandbytes' 4-bit formats, and the length of every loop over one.
BLOCK = 64
_CODES = 16
_TORCH = TorchKernels()

# As loops have them: 1 first, the scale that torch starts from.
_FACTORS = np.array((1, *SEARCH_FACTORS), np.float32)
# Bits of a float32 that a type has no room for.
_DROPPED = {F32: 0, BF16: 16, F16: 13}


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """A grid's values padded to 16, or to 256: what the loops look up. A rank is a place in rising order.

    `half`: code c stands for c / half - 1, if it is above 0; -1: the codes are E4M3. `pairs` of a byte's two codes,
    that in its high half first, and that in its low half first; of grids of at most 16.
    """

    midpoints: Array
    rising: Array
    gaps: Array
    by_code: Array
    by_rank: Array
    pairs: tuple[Array, Array]
    half: Any
    in_order: bool


@functools.cache
def _table(values: tuple[float, ...], is_float: bool) -> _Table:
    known = tables_of(values, torch.device("cpu"), is_float)
    rising = known.distinct.thresholds.numpy()
    by_rank = known.codes.numpy()
    length = _CODES if len(values) <= _CODES else 256
    by_code = np.zeros(length, np.float32)
    by_code[: len(values)] = values
    high, low = np.repeat(by_code[:_CODES], _CODES), np.tile(by_code[:_CODES], _CODES)
    return _Table(
        midpoints=_padded(known.midpoints.thresholds.numpy(), np.inf, length),
        rising=_padded(rising, np.inf, length),
        gaps=_padded(np.diff(rising), 0, length),
        by_code=by_code,
        by_rank=_padded(by_rank, 0, length),
        pairs=(_in_one(high, low), _in_one(low, high)),
        half=np.float32(-1 if is_float and values == E4M3.values else _half(values)),
        in_order=known.codes_are_ranks,
    )


def _half(values: tuple[float, ...]) -> int:
    half = len(values) // 2
    is_power = half & (half - 1) == 0
    return half if is_power and values == tuple(code / half - 1 for code in range(2 * half)) else 0


def _in_one(first: Array, second: Array) -> Array:
    """Two float32 as one 8-byte item."""
    return np.stack((first, second), axis=1).view(np.uint64).reshape(-1)


def _padded(entries: Array, filler: float, length: int) -> Array:
    return np.append(entries, np.full(length - len(entries), filler, entries.dtype))


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """See Kernels."""

    name: str = "compiled"

    def starting_scales(self, values: Tensor, grid: Grid, out: Tensor) -> Tensor:
        if grid.order:
            return ordered.starting_scales(self, values, grid, out)
        if grid.offsets is not None:
            return offsets.starting_scales(values, grid, out)
        if grid.rule is not None:
            return out.copy_(grid.rule.start(values.view(-1, grid.block)))
        whole = values.numel() // grid.block
        loop = loops.absmax_64 if grid.block == BLOCK else loops.absmax
        loop(_bits(_rows(values, whole, grid.block)), _bits(out.numpy()[:whole]))
        over_reach(out[:whole], grid)
        if whole < out.numel():
            _TORCH.starting_scales(values[whole * grid.block :], grid, out[whole:])
        return out

    def ranges(self, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
        blocks = _rows(values, values.numel() // block, block)
        low, high = (torch.empty(len(blocks)) for _ in range(2))
        offset_loops.ranges(blocks.view(np.int32), low.numpy(), high.numpy())
        return low, high

    def nearest(self, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
        if grid.order or grid.offsets is not None:
            return self._nearest_moved(values, grid, scales, codes)
        if not isinstance(grid, IntegerGrid) and not _is_table(grid):
            return _TORCH.nearest(values, grid, scales, codes)
        scales = self._scales(values, grid) if scales is None else scales
        whole = values.numel() // grid.block
        arrays = (_rows(values, whole, grid.block), scales.numpy()[:whole])
        into = _rows(codes, whole, grid.block)
        if isinstance(grid, TableGrid):
            _nearest_in_table(grid, *arrays, into)
        else:
            loops.nearest_integer(*arrays, *_peak_and_floor(grid), into)
        if whole < scales.numel():
            rest = slice(whole * grid.block, None)
            _TORCH.nearest(values[rest], grid, scales[whole:], codes[rest])
        return scales

    def _nearest_moved(self, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
        """Nearest codes where blocks have offsets, or their columns lie scattered."""
        half = _even_steps(grid)
        if not half:
            by_torch = ordered.nearest if grid.order else offsets.nearest
            return by_torch(self, values, grid, scales, codes)
        scales = self._scales(values, grid) if scales is None else scales
        if grid.order:
            scattered = _Scattered.of(grid, scales)
            rows, into = scattered.by_rows(values), scattered.by_rows(codes)
            offset_loops.nearest_scattered(rows, *scattered.numbers, half, into)
        else:
            rows, into = (_rows(each, len(scales), grid.block) for each in (values, codes))
            offset_loops.nearest(rows, scales.numpy(), half, into)
        return scales

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
        if not _is_compiled(grid):
            return _TORCH.stochastic(values, grid, scales, start, noise, codes)
        scales = self._scales(values, grid) if scales is None else scales
        whole = values.numel() // grid.block
        arrays = (_rows(values, whole, grid.block), scales.numpy()[:whole])
        old = Start(codes, values) if start is None else start  # not looked at if there is none
        from_codes, base = _rows(old.codes, whole, grid.block), _rows(old.values, whole, grid.block)
        drawn, into = _rows(noise, whole, grid.block), _rows(codes, whole, grid.block)
        if isinstance(grid, TableGrid):
            _stochastic_in_table(grid, arrays, (from_codes, base, start is not None), drawn, into)
        else:
            signed = from_codes.view(np.int8)
            loops.stochastic_integer(
                *arrays, signed, base, start is not None, drawn, *_peak_and_floor(grid), into
            )
        if whole < scales.numel():
            rest = slice(whole * grid.block, None)
            last = None if start is None else Start(start.codes[rest], start.values[rest])
            _TORCH.stochastic(values[rest], grid, scales[whole:], last, noise[rest], codes[rest])
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
        if weights is not None or not isinstance(grid, TableGrid) or not _is_compiled(grid):
            _TORCH.search(values, grid, scales, weights)
            return
        whole, table = values.numel() // grid.block, _table(grid.values, grid.is_float)
        self.starting_scales(values, grid, scales)
        given, found = (_rows(values, whole, grid.block), _FACTORS, SEARCH_STEPS), scales.numpy()[:whole]
        if _is_e4m3(grid):
            loops.search_e4m3(*given, table.by_code, found)
        elif (of_e2m1 := _of_e2m1(grid)) is not None:
            of_e2m1.search(*given, found)
        elif table.half:
            loops.search_uniform(*given, table.half, found)
        else:
            loops.search(*given, table.midpoints, table.rising, found)
        if whole < scales.numel():
            _TORCH.search(values[whole * grid.block :], grid, scales[whole:])

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
        table = _table(grid.values, grid.is_float) if isinstance(grid, TableGrid) and grid.peak == 1 else None
        if table is None or (len(table.by_code) > _CODES and not table.half):
            _TORCH.quantize_columns(
                target, pull, coupling, rows, grid, scales, dtype, codes, errors, is_first
            )
            return
        look_up = (table.midpoints, table.half, table.rising, table.by_code, table.by_rank)
        arrays = (target.numpy(), pull.numpy(), coupling.numpy(), scales.numpy())
        into = (codes.numpy(), errors.numpy(), is_first, _DROPPED[dtype])
        if rows is None:
            column_loops.quantize_columns(*arrays, *look_up, *into)
        else:
            column_loops.quantize_columns_in_turn(*arrays, rows.numpy(), *look_up, *into)

    def add_product(self, sparse: Tensor, matrix: Tensor, out: Tensor) -> None:
        column_loops.add_product(sparse.numpy(), matrix.numpy(), out.numpy())

    def uniform(self, key: int, first: int, out: Tensor) -> None:
        even = out.numel() // 2 * 2
        if first % 2:
            _TORCH.uniform(key, first, out)
            return
        # Words are made where their two numbers will be.
        numbers = out[:even].numpy()
        loops.words(np.uint64(key % (1 << 64)), np.uint64(first // 2), numbers.view(np.uint64))
        loops.fractions(_bits(numbers), numbers)
        if even < out.numel():
            _TORCH.uniform(key, first + even, out[even:])

    def pack_pairs(self, codes: Tensor, out: Tensor, *, low_first: bool = False) -> None:
        loops.pack(_pairs(codes.numpy()), low_first, out.numpy())

    def unpack_pairs(self, packed: Tensor, codes: Tensor, *, low_first: bool = False) -> None:
        count = codes.numel() // 2
        loops.unpack(packed.numpy()[:count], low_first, _pairs(codes.numpy()[: 2 * count]))
        if 2 * count < codes.numel():
            _TORCH.unpack_pairs(packed[count:], codes[2 * count :], low_first=low_first)

    def take_columns(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        offset_loops.take_columns(matrix.numpy(), _unsigned(columns), out.numpy())

    def put_columns(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        offset_loops.put_columns(matrix.numpy(), _unsigned(columns), out.numpy())

    def unpack_bits(self, packed: Tensor, bits: int, codes: Tensor) -> None:
        offset_loops.unpack_bits(packed.numpy().reshape(-1, bits), codes.numpy().reshape(-1, 8))

    def pack_bits(self, codes: Tensor, bits: int, out: Tensor) -> None:
        offset_loops.pack_bits(codes.numpy().reshape(-1, 8), out.numpy().reshape(-1, bits))

    def turn_words(self, words: Tensor, out: Tensor) -> None:
        loops.turn_words(words.numpy(), out.numpy())

    def turn_codes(self, words: Tensor, places: tuple[int, ...], out: Tensor) -> None:
        loops.turn_codes(_unsigned(words), np.array(places), _unsigned(out))

    def turn_codes_back(self, words: Tensor, places: tuple[int, ...], out: Tensor) -> None:
        loops.turn_codes_back(_unsigned(words), np.array(places), _unsigned(out))

    def decode(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        if grid.order or grid.offsets is not None:
            self._decode_moved(codes, grid, scales, dtype, out)
            return
        if not isinstance(grid, IntegerGrid) and not _is_table(grid):
            _TORCH.decode(codes, grid, scales, dtype, out)
            return
        whole = out.numel() // grid.block
        read, values = _rows(codes, whole, grid.block), _rows(out, whole, grid.block)
        factors = scales.numpy()[:whole]
        if _is_e4m3(grid):
            loops.decode_e4m3(read, factors, _bits(values), values)
        elif half := _even_steps(grid):
            loops.decode_uniform(read, half, factors, values)
        elif isinstance(grid, TableGrid):
            loops.decode_table(read, _table(grid.values, grid.is_float).by_code, factors, values)
        else:
            loops.decode_integer(read.view(np.int8), factors, np.float32(1 / grid.peak), values)
        _round_to(dtype, values)
        if whole < scales.numel():
            rest = slice(whole * grid.block, None)
            _TORCH.decode(codes[rest], grid, scales[whole:], dtype, out[rest])

    def _decode_moved(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        """Decode where blocks have offsets, or their columns lie scattered."""
        half = _even_steps(grid)
        if not half:
            by_torch = ordered.decode if grid.order else offsets.decode
            by_torch(self, codes, grid, scales, dtype, out)
            return
        if grid.order:
            scattered = _Scattered.of(grid, scales)
            has_shift = grid.offsets is not None
            values = scattered.by_rows(out)
            known = scattered.by_rows(codes), *scattered.numbers, half, has_shift
            offset_loops.decode_scattered(*known, values)
        else:
            values = _rows(out, len(scales), grid.block)
            offset_loops.decode(_rows(codes, *values.shape), scales.numpy(), half, values)
        _round_to(dtype, values)

    def decode_in_steps(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        half = _even_steps(grid)
        if not half:
            _TORCH.decode_in_steps(codes, grid, scales, dtype, out)
            return
        values = _rows(out, len(scales), grid.block)
        offset_loops.multiply(_rows(codes, *values.shape), scales.numpy(), half, values)
        _round_to(dtype, values)
        offset_loops.add(scales.numpy(), values)
        _round_to(dtype, values)

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
        if not _is_table(grid) or grid.block % 2:
            _TORCH.decode_pairs(packed, grid, scales, dtype, out, low_first=low_first)
            return
        if _even_steps(grid):
            codes = torch.empty(out.numel(), dtype=torch.uint8)
            self.unpack_pairs(packed, codes, low_first=low_first)
            self.decode(codes, grid, scales, dtype, out)
            return
        whole = out.numel() // grid.block
        values = _rows(out, whole, grid.block)
        read = _rows(packed, whole, grid.block // 2)
        pairs = _table(grid.values, grid.is_float).pairs[low_first]
        loops.decode_pairs(read, pairs, scales.numpy()[:whole], values.view(np.uint64), values)
        _round_to(dtype, values)
        if whole < scales.numel():
            first = whole * grid.block
            rest = (packed[first // 2 :], grid, scales[whole:], dtype, out[first:])
            _TORCH.decode_pairs(*rest, low_first=low_first)

    def distance(self, left: Tensor, right: Tensor, block: int) -> Tensor:
        whole = left.numel() // block
        sums = np.empty(-(-left.numel() // block), np.float32)
        loops.distance(_rows(left, whole, block), _rows(right, whole, block), sums)
        if whole < sums.size:
            difference = left[whole * block :] - right[whole * block :]
            sums[-1] = block_dots(difference, difference, block).item()
        return torch.tensor(loops.tree_sum(sums.astype(np.float64)), dtype=torch.float64)

    def kept(
        self, codes: Tensor, grid: Grid, target: Tensor, base: Tensor, anchor: Tensor, inner: Tensor
    ) -> Tensor:
        if grid.order:
            return ordered.kept(self, codes, grid, target, base, anchor, inner)
        if grid.offsets is not None:
            return offsets.kept(self, codes, grid, target, base, anchor, inner)
        if not isinstance(grid, IntegerGrid) and not _is_table(grid):
            return _TORCH.kept(codes, grid, target, base, anchor, inner)
        whole = codes.numel() // grid.block
        sums = np.empty((2, inner.numel()), np.float32)
        arrays = tuple(_rows(each, whole, grid.block) for each in (target, base, anchor))
        read, into = _rows(codes, whole, grid.block), inner.numpy()[:whole]
        if isinstance(grid, TableGrid):
            of_e2m1 = _of_e2m1(grid)
            loop = loops.kept_table if _is_short(grid) else loops.kept_in_any_table
            loop = loop if of_e2m1 is None else of_e2m1.kept
            loop(read, _table(grid.values, grid.is_float).by_code, *arrays, into, sums)
        else:
            loops.kept_integer(read.view(np.int8), *arrays, into, sums)
        if whole < inner.numel():
            rest = slice(whole * grid.block, None)
            sums[:, -1] = _TORCH.kept(
                codes[rest], grid, target[rest], base[rest], anchor[rest], inner[whole:]
            )
        return torch.tensor(
            [loops.tree_sum(blocks) for blocks in sums.astype(np.float64)], dtype=torch.float64
        )

    def _scales(self, values: Tensor, grid: Grid) -> Tensor:
        return self.starting_scales(values, grid, empty_scales(values.numel(), grid, values.device))


@dataclass(frozen=True, slots=True, eq=False)
class _Scattered:
    """Blocks of whole rows whose columns are not runs: `numbers` are scales, shifts, and the block of each column."""

    numbers: tuple[Array, Array, Array]

    @classmethod
    def of(cls, grid: Grid, scales: Tensor) -> _Scattered:
        groups = _groups(grid.order, grid.block)
        known = scales.numpy().reshape(-1, groups.size // grid.block, *scales.shape[1:])
        if grid.offsets is None:
            return cls((known, np.zeros_like(known), groups))
        return cls((np.ascontiguousarray(known[..., 0]), known[..., 0] + known[..., 1], groups))

    def by_rows(self, flat: Tensor) -> Array:
        return flat.numpy().reshape(-1, self.numbers[2].size)


@functools.lru_cache(maxsize=8)
def _groups(order: bytes, block: int) -> Array:
    """The block that each column is in."""
    columns = np.frombuffer(order, np.int32)
    groups = np.empty(columns.size, np.uint32)
    groups[columns] = np.arange(columns.size, dtype=np.uint32) // np.uint32(block)
    return groups


def _even_steps(grid: Grid) -> Any:
    """`half` of a grid as `loops.nearest_uniform` has it; of others 0."""
    if not isinstance(grid, TableGrid) or grid.peak != 1 or grid.is_float:
        return np.float32(0)
    half = _table(grid.values, grid.is_float).half
    return half if half > 0 else np.float32(0)


def _is_compiled(grid: Grid) -> bool:
    """Whether all loops are there for this grid: integers, even steps, floats, or 16 values in blocks of 64."""
    if isinstance(grid, TableGrid):
        is_short = (_is_short(grid) and not grid.is_float) or _of_e2m1(grid) is not None
        return _is_table(grid) and (is_short or bool(_table(grid.values, grid.is_float).half))
    return isinstance(grid, IntegerGrid)


def _of_e2m1(grid: Grid) -> BlockLoops | None:
    """Loops of its own for blocks of E2M1."""
    is_e2m1 = isinstance(grid, TableGrid) and grid.is_float and grid.values == E2M1.values
    return E2M1_LOOPS.get(grid.block) if is_e2m1 and _is_table(grid) else None


def _is_table(grid: Grid) -> bool:
    return isinstance(grid, TableGrid) and grid.peak == 1


def _is_short(grid: TableGrid) -> bool:
    """Whether the loops fit that have 16 and 64 written out."""
    return grid.block == BLOCK and len(grid.values) <= _CODES


def _is_e4m3(grid: Grid) -> bool:
    return isinstance(grid, TableGrid) and _table(grid.values, grid.is_float).half < 0


def _nearest_in_table(grid: TableGrid, values: Array, scales: Array, codes: Array) -> None:
    if _is_e4m3(grid):
        loops.nearest_e4m3(values, scales, codes)
        return
    if (of_e2m1 := _of_e2m1(grid)) is not None:
        of_e2m1.nearest(values, scales, codes)
        return
    table = _table(grid.values, grid.is_float)
    if table.half:
        loops.nearest_uniform(values, scales, table.half, codes)
        return
    if _is_short(grid):
        loops.nearest_table(values, scales, table.midpoints, codes)
        _from_ranks(table, codes)
        return
    known = grid.tables(torch.device("cpu"))
    midpoints = _padded(known.midpoints.thresholds.numpy(), np.inf, 256)
    loops.nearest_in_any_table(values, scales, midpoints, codes)
    if not known.codes_are_ranks:
        loops.rename(codes.reshape(-1), known.codes.numpy())


def _stochastic_in_table(
    grid: TableGrid, given: tuple[Array, Array], start: tuple[Array, Array, bool], noise: Array, codes: Array
) -> None:
    table = _table(grid.values, grid.is_float)
    if (of_e2m1 := _of_e2m1(grid)) is not None:
        of_e2m1.stochastic(*given, *start, noise, table.by_code, codes)
        return
    if table.half < 0:
        loops.stochastic_e4m3(*given, *start, noise, table.by_code, codes)
        return
    if table.half:
        loops.stochastic_uniform(*given, *start, noise, table.half, codes)
        return
    loops.stochastic_table(*given, *start, noise, table.rising, table.gaps, table.by_code, codes)
    _from_ranks(table, codes)


def _pairs(codes: Array) -> Array:
    """Two codes as one item, the first in its low byte on any machine."""
    return codes.view("<u2")


def _from_ranks(table: _Table, codes: Array) -> None:
    if not table.in_order:
        loops.rename(codes.reshape(-1), table.by_rank)


def _peak_and_floor(grid: Grid) -> tuple[Any, Any]:
    return np.float32(grid.peak), np.float32(SMALLEST_DIVISOR * grid.peak)


def _rows(tensor: Tensor, count: int, length: int) -> Array:
    """The first `count` stretches of `length`, one a row (a slice of an array costs less than one of a tensor)."""
    return tensor.numpy()[: count * length].reshape(count, length)


def _round_to(dtype: Dtype, values: Array) -> None:
    if dtype == BF16:
        loops.to_bfloat16(_bits(values).reshape(1, -1))  # in one stretch: blocks may be short
    else:
        round_to(dtype, torch.from_numpy(values))


def _unsigned(words: Tensor) -> Array:
    return words.numpy().view(np.uint32)


def _bits(values: Array) -> Array:
    return values.view(np.uint32)


def load() -> CompiledKernels | None:
    """The kernels; None where numba was told not to compile (its switch, NUMBA_DISABLE_JIT)."""
    return None if numba.config.DISABLE_JIT else CompiledKernels()
