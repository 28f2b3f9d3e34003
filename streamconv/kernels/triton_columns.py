"""Loop for CUDA devices over a panel of columns that are settled one after another; see `triton_loops.py`.

Rows know nothing of each other, so a program takes some of them through all columns of the panel, in one launch.
"""

from __future__ import annotations

import triton.language as tl

from streamconv.kernels.triton_loops import held, in_units, jit, nearest_code, value_of


@jit
def loaded(
    code: tl.tensor,
    scale: tl.tensor,
    by_code: tl.tensor,
    PEAK: tl.constexpr,
    PER_PEAK: tl.constexpr,
    DROPPED: tl.constexpr,
    IS_INTEGER: tl.constexpr,
) -> tl.tensor:
    """Values that a loader makes of codes with a scale each."""
    found = value_of(code, by_code, IS_INTEGER) * scale
    if PEAK != 1.0:
        found = found * PER_PEAK
    return held(found, DROPPED)


@jit
def settle_columns(
    target: tl.tensor,
    pull: tl.tensor,
    coupling: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    columns: tl.tensor,
    count: tl.tensor,
    midpoints: tl.tensor,
    names: tl.tensor,
    by_code: tl.tensor,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PEAK: tl.constexpr,
    PER_PEAK: tl.constexpr,
    FLOOR: tl.constexpr,
    DROPPED: tl.constexpr,
    STEPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    IN_ORDER: tl.constexpr,
    IS_FIRST: tl.constexpr,
) -> None:
    """Take rows, TILE of `count` a program, through the columns. Tensors are [`columns`, `count`]; `pull` is changed.

    `coupling` is [`columns`, `columns`], of which there are at most WIDTH.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = row < count
    further = tl.arange(0, WIDTH)
    for j in range(columns):
        place = j * count + row
        goal = tl.load(target + place, mask=is_there, other=0.0)
        scale = tl.load(scales + place, mask=is_there, other=1.0)
        wanted = goal + tl.load(pull + place, mask=is_there, other=0.0)
        x = in_units(wanted, scale, is_there, PEAK, FLOOR, False)
        code = nearest_code(x, midpoints, names, PEAK, STEPS, IS_INTEGER, IN_ORDER)
        value = loaded(code, scale, by_code, PEAK, PER_PEAK, DROPPED, IS_INTEGER)
        if not IS_FIRST:
            old_code = tl.load(codes + place, mask=is_there, other=0)
            old = loaded(old_code, scale, by_code, PEAK, PER_PEAK, DROPPED, IS_INTEGER)
            is_better = tl.abs(wanted - value) < tl.abs(wanted - old)
            code = tl.where(is_better, code, old_code)
            value = tl.where(is_better, value, old)
        error = goal - value
        change = error - tl.load(errors + place, mask=is_there, other=0.0)
        tl.store(codes + place, code, mask=is_there)
        tl.store(errors + place, error, mask=is_there)
        is_moved = ((further > j) & (further < columns))[:, None] & is_there[None, :]
        pulls = pull + further[:, None] * count + row[None, :]
        weight = tl.load(coupling + j * columns + further, mask=further < columns, other=0.0)
        moved = tl.load(pulls, mask=is_moved, other=0.0) + weight[:, None] * change[None, :]
        tl.store(pulls, moved, mask=is_moved)
        tl.debug_barrier()  # what a column is pulled by may be loaded by other threads than stored it
