"""Memory that cells, blocks and tiles of a weight take where a GPU computes: measured, by what is done with a cell.

Copies are float32 tensors of one cell alive at once, in torch's operations: a code counts a quarter, an index in 32
bits a whole, a pair of values two. They are what a device of the tests' own counts, whose allocations are told.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.kernels.grids import Grid, IntegerGrid, TableGrid
from streamconv.planning.devices import Device
from streamconv.planning.plan import Rewrite, cell_rows, tile_rows
from streamconv.planning.scales import FRESH
from streamconv.sizes import power_of_two

# Values and target of a cell, what it divides by, and what looking up the nearest codes takes.
_NEAREST = 5.8
_STOCHASTIC = 7.8
_SEARCH = 9.1
# Beside these: codes and values that stochastic rounding starts from; of a float, whose zeros have signs, more.
_START = 1.0
_FLOAT_START = 3.3
_OFFSETS = 1.35
# The base as it lies on a grid, codes and all; and as it is rounded first.
_ON_GRID = 1.25
_ROUNDED = 2.3
# Of a cell that is stored dense: decoded from a grid of 4 bits or of integers, or any; of a base that is rounded first.
_DECODED_SIMPLY = 2.5
_DECODED = 3.25
_DENSE_ROUNDED = 6.75
# Where someone looks at every cell.
_WATCHED = 16
# Gathered columns of a grid with an order of its own: values, codes, and their places.
_ORDERED = 2.5
# Per number of a scale: chosen and kept product; scales of a base as they are read and as they will be, and of one
# rounded first; and what nesting them, or rounding them to what is stored, takes at the end.
_BYTES_PER_BLOCK = 8
_BYTES_PER_BASE_BLOCK = 8
_FINISHING_BYTES_PER_BLOCK = 13
# Bytes of a tensor that is only copied, from which on larger pieces gain nothing where tiles are as small.
_COPIED_AT_ONCE = 4 * 2**20
# In host memory: float32 as they came, stored, as bytes, and those of the weight before until they are written.
_HOST_BYTES_PER_BLOCK = 24


def work_bytes(step: Rewrite, device: Device, watched: bool = False) -> int:
    """Bytes on a GPU that one cell takes while it is computed, or scales when all cells are done."""
    cell = min(cell_rows(device, step), step.rows) * step.columns * 4
    copies = max(_copies(step), _WATCHED if watched else 0)
    return max(int(copies * cell), _FINISHING_BYTES_PER_BLOCK * numbers(step, step.encoder.grid))


def _copies(step: Rewrite) -> float:
    base, update = step.weight.decoder.grid, max((update.cell_copies for update in step.applied), default=0)
    if step.encoder.grid is None:
        of_base = _DENSE_ROUNDED if step.merge_base is not None else _decoding_copies(base)
        return max(of_base, 1 + update)
    of_base = _ROUNDED if step.merge_base is not None else 0 if base is None else _ON_GRID
    return of_base + max(_rounding_copies(step, step.encoder.grid), 2 + update)


def _decoding_copies(grid: Grid | None) -> float:
    if grid is None:
        return 1
    is_simple = isinstance(grid, IntegerGrid) or (isinstance(grid, TableGrid) and len(grid.values) <= 16)
    return _DECODED_SIMPLY if is_simple and grid.offsets is None else _DECODED


def _rounding_copies(step: Rewrite, grid: Grid) -> float:
    rounding, more = step.rounding, 0.0
    if grid.offsets is not None:
        more += _OFFSETS
    if grid.order:
        more += _ORDERED
    if rounding is None:
        return _NEAREST + more
    if rounding.searches_scales and grid.rule is None:
        return _SEARCH + more
    if not rounding.needs_noise:
        return _NEAREST + more
    if step.scales == FRESH:
        return _STOCHASTIC + more
    is_float = isinstance(grid, TableGrid) and grid.is_float
    return _STOCHASTIC + more + (_FLOAT_START if is_float else _START)


def block_bytes(step: Rewrite) -> int:
    """Bytes kept on a GPU for every block until the weight is finished."""
    found = _BYTES_PER_BLOCK * numbers(step, step.encoder.grid)
    found += _BYTES_PER_BASE_BLOCK * numbers(step, step.weight.decoder.grid)
    if step.merge_base is not None:
        found += _BYTES_PER_BASE_BLOCK * numbers(step, step.merge_base.grid)
    return found


def host_block_bytes(step: Rewrite) -> int:
    """Bytes of host memory for scales of a weight that is finished, and of the one before."""
    return _HOST_BYTES_PER_BLOCK * numbers(step, step.encoder.grid)


def numbers(step: Rewrite, grid: Grid | None) -> int:
    """Scales and offsets of all blocks."""
    if grid is None:
        return 0
    return -(-step.rows * step.columns // grid.block) * (1 if grid.offsets is None else 2)


def tile_sizes(steps: Sequence[Rewrite], device: Device, most: int, least: int) -> list[tuple[int, int]]:
    """Bytes of buffers for a tile as it is read, and as it is written: the largest that gain anything, then smaller.

    Powers of two, because pinned memory is allocated in these; each holds a cell, and a line where a file has lines.
    """
    found: list[tuple[int, int]] = []
    size = most
    while size >= least:
        sizes = _tile_size(steps, device, size)
        if sizes not in found:
            found.append(sizes)
        size //= 2
    return found


def _tile_size(steps: Sequence[Rewrite], device: Device, size: int) -> tuple[int, int]:
    read, written = size if not steps else min(size, _COPIED_AT_ONCE), 1
    lines = [(step.weight.decoder.order, step.encoder.order) for step in steps]
    read = max([read, *(order.line_bytes for order, _ in lines if order is not None)])
    written = max([written, *(order.line_bytes for _, order in lines if order is not None)])
    for step in steps:
        height = min(cell_rows(device, step), step.rows)
        of_cell = step.weight.decoder.row_offset(height), step.encoder.row_offset(height)
        rows = min(step.rows, tile_rows(step, max(size, of_cell[0]), height, max(size, of_cell[1])))
        read = max(read, step.weight.decoder.row_offset(rows))
        written = max(written, step.encoder.row_offset(rows))
    return power_of_two(read), power_of_two(written)
