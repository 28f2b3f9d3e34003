"""The kernels for CUDA devices: tensors in, one launch of `triton_loops.py` over them, the bits of the torch ones.

Served are grids of a table (nf4, fp4, E2M1, E4M3, integers of groups, the one of nested scales) and of int8. What comes
up once a weight or never, the short block at the end of a sum or a search, is left to torch, and so are rows that are
settled in turn, for which calibrated rounding goes to the CPU.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamconv.dtypes import BF16, F16, F32, Dtype
from streamconv.kernels import triton_columns, triton_loops
from streamconv.kernels.base import SEARCH_FACTORS, SEARCH_STEPS, Kernels, Start, block_dots
from streamconv.kernels.grids import NF4, SMALLEST_DIVISOR, Grid, IntegerGrid, TableGrid, empty_scales
from streamconv.kernels.in_torch import TorchKernels

_TORCH = TorchKernels()
# Elements of a program, and of one that searches; foldings of one launch; and the longest block that lies in
# registers, and that is searched.
TILE, _SEARCHED = 1024, 512
# Rows of a panel that a program settles: few, so that all of a card has some.
_ROWS = 64
_LEVELS = 6
_WIDEST, _WIDEST_SEARCHED = 16384, 4096
# Bits of a float32 that a type has no room for.
_DROPPED = {F32: 0, BF16: 16, F16: 13}


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """A grid's values on a device; thresholds are padded by infinity to 2^`steps` - 1, values of codes to 256.

    `midpoints` and `rising` values have the places that `names` has the codes of. `least` and `greatest` of the values.
    """

    midpoints: Tensor
    rising: Tensor
    names: Tensor
    by_code: Tensor
    steps: int
    in_order: bool
    is_integer: bool
    is_float: bool
    least: float
    greatest: float


@functools.cache
def _table(values: tuple[float, ...], is_float: bool, device: torch.device) -> _Table:
    """Table of a TableGrid with `values`."""
    known = TableGrid("", values, 1, is_float=is_float).tables(torch.device("cpu"))
    rising = known.distinct.thresholds
    # As many steps as find a place among all values: one more than there are midpoints.
    steps = len(rising).bit_length()
    return _Table(
        midpoints=_padded(known.midpoints.thresholds, torch.inf, 1 << steps).to(device),
        rising=_padded(rising, torch.inf, 1 << steps).to(device),
        names=_padded(known.codes, 0, 1 << steps).to(device),
        by_code=_padded(known.values, 0, 256).to(device),
        steps=steps,
        in_order=known.codes_are_ranks,
        is_integer=False,
        is_float=is_float,
        least=known.least,
        greatest=known.greatest,
    )


@functools.cache
def _integers(peak: float, device: torch.device) -> _Table:
    """Table of an IntegerGrid: there is nothing to look up."""
    nothing = torch.zeros(1, device=device)
    return _Table(nothing, nothing, nothing, nothing, 0, True, True, False, -peak, peak)


def _padded(entries: Tensor, filler: float, length: int) -> Tensor:
    return torch.cat((entries, entries.new_full((length - len(entries),), filler)))


@dataclass(frozen=True, slots=True)
class TritonKernels(TorchKernels):
    """See Kernels. What is not written here is done by torch: words, and bits that are no half byte."""

    name: str = "triton"

    def starting_scales(self, values: Tensor, grid: Grid, out: Tensor) -> Tensor:
        table = _table_of(grid, values.device)
        if table is None or grid.rule is not None or grid.block > _WIDEST:
            return TorchKernels.starting_scales(self, values, grid, out)
        _encode_blocks(values, grid, table, out, None)
        return out

    def nearest(self, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
        table = _table_of(grid, values.device)
        if table is None:
            return TorchKernels.nearest(self, values, grid, scales, codes)
        if scales is None:
            scales = empty_scales(values.numel(), grid, values.device)
            if grid.rule is None and grid.block <= _WIDEST:
                _encode_blocks(values, grid, table, scales, codes)
                return scales
            self.starting_scales(values, grid, scales)
        launch(
            triton_loops.nearest,
            values.numel(),
            TILE,
            (values, scales, codes, values.numel(), table.midpoints, table.names),
            {**_lookup(grid, table, values.numel()), "TILE": TILE},
        )
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
        table = _table_of(grid, values.device)
        if table is None:
            return TorchKernels.stochastic(self, values, grid, scales, start, noise, codes)
        if scales is None:
            scales = empty_scales(values.numel(), grid, values.device)
            self.starting_scales(values, grid, scales)
        old = Start(codes, values) if start is None else start  # not looked at if there is none
        given = (values, scales, old.codes, old.values, noise, codes, values.numel())
        launch(
            triton_loops.stochastic,
            values.numel(),
            TILE,
            (*given, table.rising, table.names, table.by_code),
            {
                **_lookup(grid, table, values.numel()),
                "TILE": TILE,
                "LEAST": table.least,
                "GREATEST": table.greatest,
                "HAS_START": start is not None,
                "IS_FLOAT": table.is_float,
            },
        )
        return scales

    def search(self, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None = None) -> None:
        table, is_power = _table_of(grid, values.device), grid.block & (grid.block - 1) == 0
        if table is None or grid.rule is not None or not is_power or grid.block > _WIDEST_SEARCHED:
            TorchKernels.search(self, values, grid, scales, weights)
            return
        whole = values.numel() // grid.block
        factors = _factors(values.device)
        given = (values, values if weights is None else weights, factors, scales, whole)
        rows = max(1, _SEARCHED // grid.block)
        launch(
            triton_loops.search,
            whole,
            rows,
            (*given, table.midpoints, table.rising),
            {
                "FACTORS": len(SEARCH_FACTORS),
                "FITS": SEARCH_STEPS,
                "ROWS": rows,
                "LEVELS": grid.block.bit_length() - 1,
                "PEAK": grid.peak,
                "PER_PEAK": 1 / grid.peak,
                "REACH": grid.reach,
                "FLOOR": _bits(SMALLEST_DIVISOR * grid.peak),
                "STEPS": table.steps,
                "IS_INTEGER": table.is_integer,
                "HAS_WEIGHTS": weights is not None,
            },
            warps=8 if 64 < grid.block < 1024 else 4,  # so that none of a thread's numbers goes to memory
        )
        if whole < scales.numel():
            rest = slice(whole * grid.block, None)
            of_rest = None if weights is None else weights[rest]
            TorchKernels.search(self, values[rest], grid, scales[whole:], of_rest)

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
        table = _table_of(grid, target.device)
        given = (target, pull, coupling, scales, codes, errors)
        if table is None or rows is not None or not all(each.is_contiguous() for each in given):
            TorchKernels.quantize_columns(
                self, target, pull, coupling, rows, grid, scales, dtype, codes, errors, is_first
            )
            return
        columns, count = target.shape
        launch(
            triton_columns.settle_columns,
            count,
            _ROWS,
            (*given, columns, count, table.midpoints, table.names, table.by_code),
            {
                "TILE": _ROWS,
                "WIDTH": 1 << (columns - 1).bit_length(),
                "PEAK": grid.peak,
                "PER_PEAK": 1 / grid.peak,
                "FLOOR": _bits(SMALLEST_DIVISOR * grid.peak),
                "DROPPED": _DROPPED[dtype],
                "STEPS": table.steps,
                "IS_INTEGER": table.is_integer,
                "IN_ORDER": table.in_order,
                "IS_FIRST": is_first,
            },
        )

    def uniform(self, key: int, first: int, out: Tensor) -> None:
        launch(
            triton_loops.uniform,
            out.numel(),
            TILE,
            (key, first, out, out.numel()),
            {"TILE": TILE},
        )

    def pack_pairs(self, codes: Tensor, out: Tensor, *, low_first: bool = False) -> None:
        launch(
            triton_loops.pack_pairs,
            out.numel(),
            TILE,
            (codes.contiguous(), out, out.numel()),
            {"TILE": TILE, "LOW_FIRST": low_first},
        )

    def unpack_pairs(self, packed: Tensor, codes: Tensor, *, low_first: bool = False) -> None:
        launch(
            triton_loops.unpack_pairs,
            codes.numel(),
            TILE,
            (packed.contiguous(), codes, codes.numel()),
            {"TILE": TILE, "LOW_FIRST": low_first},
        )

    def decode(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        table = _table_of(grid, out.device)
        if table is None:
            TorchKernels.decode(self, codes, grid, scales, dtype, out)
            return
        _decode(codes, grid, table, scales, dtype, out)

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
        table = _table_of(grid, out.device)
        assert table is not None, f"{grid.name} has no table"
        _decode(packed, grid, table, scales, dtype, out, "low" if low_first else "high")

    def distance(self, left: Tensor, right: Tensor, block: int) -> Tensor:
        whole = left.numel() // block
        levels, left_over = _levels(block), _left(block)
        count = whole * left_over
        sums, rows = torch.empty(1, count, device=left.device), TILE >> levels
        given = (left, right, sums, count)
        launch(
            triton_loops.distance,
            count,
            rows,
            given,
            {"BLOCK": block, "ROWS": rows, "LEVELS": levels},
        )
        parts = _folded(sums.view(whole, left_over)).view(1, -1)
        if left.numel() % block:
            rest = left[whole * block :] - right[whole * block :]
            parts = torch.cat((parts, block_dots(rest, rest, block).view(1, 1)), dim=1)
        return _folded(parts, torch.float64)[0]

    def kept(
        self, codes: Tensor, grid: Grid, target: Tensor, base: Tensor, anchor: Tensor, inner: Tensor
    ) -> Tensor:
        table = _table_of(grid, target.device)
        if table is None:
            return TorchKernels.kept(self, codes, grid, target, base, anchor, inner)
        whole, levels = target.numel() // grid.block, _levels(grid.block)
        count = whole * _left(grid.block)
        sums, rows = torch.empty(3, count, device=target.device), TILE >> levels
        launch(
            triton_loops.kept,
            count,
            rows,
            (codes, target, base, anchor, sums, count, table.by_code),
            {"BLOCK": grid.block, "ROWS": rows, "LEVELS": levels, "IS_INTEGER": table.is_integer},
        )
        parts = _folded(sums.view(3 * whole, _left(grid.block))).view(3, whole)
        inner[:whole].copy_(parts[0])
        if whole < len(inner):
            rest = slice(whole * grid.block, None)
            delta = target[rest] - base[rest]
            last = [
                block_dots(each, delta, grid.block)
                for each in (grid.decode(codes[rest]), anchor[rest], delta)
            ]
            inner[whole:].copy_(last[0])
            parts = torch.cat((parts, torch.stack(last)), dim=1)
        return _folded(parts[1:].contiguous(), torch.float64)


def _table_of(grid: Grid, device: torch.device) -> _Table | None:
    """Table of a grid that is served; orders and offsets are torch's, which asks these kernels for the rest."""
    if grid.order or grid.offsets is not None:
        return None
    if isinstance(grid, IntegerGrid):
        return _integers(grid.peak, device)
    return _table(grid.values, grid.is_float, device) if isinstance(grid, TableGrid) else None


def _lookup(grid: Grid, table: _Table, count: int) -> Mapping[str, Any]:
    """Constants of a loop that finds codes for `count` values."""
    return {
        "BLOCK": grid.block,
        "PEAK": grid.peak,
        "FLOOR": _bits(SMALLEST_DIVISOR * grid.peak),
        "HAS_SHORT": count % grid.block > 0,
        "STEPS": table.steps,
        "IS_INTEGER": table.is_integer,
        "IN_ORDER": table.in_order,
    }


@functools.cache
def _factors(device: torch.device) -> Tensor:
    return torch.tensor(SEARCH_FACTORS, dtype=torch.float32).to(device)


def _levels(block: int) -> int:
    """Foldings of a block in one launch."""
    return min(_LEVELS, (block - 1).bit_length())


def _left(block: int) -> int:
    """Sums that one launch leaves of a block."""
    return -(-block // (1 << _levels(block)))


def _bits(value: float) -> int:
    """Bits of `value` as float32."""
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


def _encode_blocks(values: Tensor, grid: Grid, table: _Table, scales: Tensor, codes: Tensor | None) -> None:
    """Starting scales, and nearest codes with them where there is room for some."""
    width = 1 << (grid.block - 1).bit_length()
    rows = max(1, TILE // width)
    into = (scales, scales if codes is None else codes, values.numel())
    launch(
        triton_loops.encode_blocks,
        scales.numel(),
        rows,
        (values, *into, table.midpoints, table.names),
        {
            **_lookup(grid, table, values.numel()),
            "ROWS": rows,
            "WIDTH": width,
            "REACH": grid.reach,
            "SHORT_FLOOR": _bits(SMALLEST_DIVISOR),
            "HAS_CODES": codes is not None,
        },
        warps=max(4, min(16, width // 512)),
    )


def _decode(
    codes: Tensor, grid: Grid, table: _Table, scales: Tensor, dtype: Dtype, out: Tensor, first: str = ""
) -> None:
    """Values of `codes`; `first`: which half of a byte has the first one, where two are packed."""
    launch(
        triton_loops.decode,
        out.numel(),
        TILE,
        (codes, scales, out, out.numel(), table.by_code),
        {
            "BLOCK": grid.block,
            "TILE": TILE,
            "PEAK": grid.peak,
            "PER_PEAK": 1 / grid.peak,
            "DROPPED": _DROPPED[dtype],
            "IS_INTEGER": table.is_integer,
            "PAIRS": bool(first),
            "LOW_FIRST": first == "low",
        },
    )


def _folded(terms: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`pairwise_sum` of every row of `terms` [rows, count], as `dtype`."""
    while terms.shape[1] > 1 or terms.dtype != dtype:
        rows, count = terms.shape
        left = -(-count // (1 << _LEVELS))
        sums = torch.empty(rows, left, dtype=dtype, device=terms.device)
        given = (terms, sums, count, left, rows * left)
        part = TILE >> _LEVELS
        is_double = dtype == torch.float64
        launch(
            triton_loops.fold,
            rows * left,
            part,
            given,
            {"ROWS": part, "LEVELS": _LEVELS, "IS_DOUBLE": is_double},
        )
        terms = sums
    return terms[:, 0]


def launch(
    loop: Any,
    count: int,
    part: int,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    warps: int = 4,
) -> None:
    """Run `loop` over `count` items, `part` of them a program, on the device of its first tensor and that's stream.

    `constants` are what a loop is compiled for; `warps` of 32 threads make a program.
    """
    if not count:
        return
    tensor = next(each for each in arguments if isinstance(each, Tensor))
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]  # torch leaves it without types
        loop[(-(-count // part),)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def load() -> TritonKernels | None:
    """The kernels; None where they do not run on this machine's device, or there give other bytes than torch.

    A few blocks are rounded by both. That compiles loops which any run needs, and what Triton has compiled it keeps.
    None, too, on AMD's devices, which torch also calls cuda, and where Triton was told to interpret.
    """
    if torch.version.hip is not None or triton_loops.IS_INTERPRETED:
        return None
    kernels, device = TritonKernels(), torch.device("cuda")
    try:
        same = agree(kernels, device)
    except Exception:  # whatever it is that Triton, its compiler or the driver lack: torch does without
        return None
    return kernels if same else None


def agree(kernels: Kernels, device: torch.device) -> bool:
    """Whether `kernels` give the bytes of the torch ones on `device`, for blocks of nf4 of which the last is short."""
    values = (torch.arange(5 * NF4.block + 9, device=device) * 12.9898).sin().mul_(0.02)
    values[: NF4.block] = 0
    ours, theirs = (_sample(each, values) for each in (kernels, _TORCH))
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _sample(kernels: Kernels, values: Tensor) -> tuple[Tensor, ...]:
    """Codes by each rounding, scales chosen and searched, decoded values, inner products and sums."""
    codes, drawn = (torch.empty_like(values, dtype=torch.uint8) for _ in range(2))
    decoded, noise = torch.empty_like(values), torch.empty_like(values)
    scales = kernels.nearest(values, NF4, None, codes)
    kernels.decode(codes, NF4, scales, BF16, decoded)
    inner, searched = torch.empty_like(scales), torch.empty_like(scales)
    sums = kernels.kept(codes, NF4, values, decoded, values, inner)
    kernels.uniform(7, 0, noise)
    kernels.stochastic(values, NF4, scales, None, noise, drawn)
    kernels.search(values, NF4, searched)
    return codes, drawn, scales, searched, decoded, inner, sums
