from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamconv.dtypes import DENSE
from streamconv.formats import FORMATS
from streamconv.formats.nested_scales import DYNAMIC
from streamconv.kernels import TORCH, Start, kernels_for
from streamconv.kernels.grids import (
    E4M3,
    E4M3_UNIT,
    FP4,
    INT4,
    INT8_GROUPS,
    NF4,
    TableGrid,
    block_absmax,
    divide_by_scales,
    empty_scales,
    multiply_by_scales,
)
from tests.formats.stored import encoder_for

EVEN = TableGrid("even", (-1.0, 0.0, 1.0), 64)
CLOSE = TableGrid("close", (-1.0, 0.0, 1e-4, 2e-4, 1.0), 64)  # thresholds too close for bins
GRIDS = [NF4, FP4, EVEN, CLOSE, DYNAMIC]


def float32(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


def midpoints(grid: TableGrid) -> Tensor:
    values = torch.tensor(sorted(set(grid.values)), dtype=torch.float32)
    return (values[:-1] + values[1:]) / 2


def around(points: Tensor) -> Tensor:
    """Points, and the float32 numbers just below and above them."""
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    return torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, down)))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_nearest_switches_exactly_at_midpoints(grid: TableGrid) -> None:
    x = torch.cat((around(midpoints(grid)), torch.rand(5000) * 2 - 1))
    values = torch.tensor(sorted(set(grid.values)), dtype=torch.float32)
    expected = values[torch.bucketize(x, midpoints(grid))]
    assert torch.equal(grid.decode(grid.nearest(x)), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_values_are_their_own_nearest_and_neighbours(grid: TableGrid) -> None:
    values = torch.tensor(grid.values, dtype=torch.float32)
    assert torch.equal(grid.decode(grid.nearest(values)), values)
    lower, upper = grid.neighbours(values)
    assert torch.equal(lower, upper)
    assert torch.equal(grid.decode(lower), values)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@given(x=st.floats(-1, 1, width=32))
def test_neighbours_enclose_with_nothing_between(grid: TableGrid, x: float) -> None:
    lower, upper = (float(grid.decode(codes)) for codes in grid.neighbours(float32(x)))
    assert lower <= min(max(x, min(grid.values)), max(grid.values)) <= upper
    values = sorted(set(torch.tensor(grid.values, dtype=torch.float32).tolist()))
    assert (lower, upper) in {*pairwise(values), *zip(values, values, strict=True)}


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_beyond_the_ends_there_is_the_end(grid: TableGrid) -> None:
    x = torch.tensor([-3e38, -1.5, 1.5, 3e38, -math.inf, math.inf])
    ends = torch.tensor([min(grid.values), max(grid.values)], dtype=torch.float32)
    expected = ends[[0, 0, 1, 1, 0, 1]]
    assert torch.equal(grid.decode(grid.nearest(x)), expected)
    for codes in grid.neighbours(x):
        assert torch.equal(grid.decode(codes), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_nan_gets_some_code(grid: TableGrid) -> None:
    nan = torch.full((3,), math.nan)
    for codes in (grid.nearest(nan), *grid.neighbours(nan)):
        assert int(codes.max()) < len(grid.values)


def test_codes_need_not_be_in_the_order_of_values() -> None:
    assert FP4.nearest(torch.tensor([1.0, -1.0, 0.51])).tolist() == [3, 11, 5]


def test_a_shared_value_has_one_code() -> None:
    x = torch.tensor([0.0, -0.0, 1e-4, -1e-4])
    assert FP4.nearest(x).tolist() == [0, 0, 0, 0]


def test_e4m3_is_the_float_of_torch() -> None:
    """Every code but the two that are NaN; and its rounding, ties to even, up to the sign of 0."""
    stored = torch.arange(256, dtype=torch.uint8)
    values = stored.view(torch.float8_e4m3fn).float() / E4M3_UNIT
    is_number = values.isfinite()
    assert is_number.sum() == 254
    assert torch.equal(E4M3.decode(stored)[is_number], values[is_number])
    assert E4M3.decode(stored)[~is_number].tolist() == [0.875, -0.875]
    x = torch.cat((around(midpoints(E4M3)), torch.rand(100000) * 2 - 1, torch.rand(10000) * 2**-14)).clamp(
        *E4M3.limits
    )
    assert torch.equal(
        E4M3.decode(E4M3.nearest(x)), (x * E4M3_UNIT).to(torch.float8_e4m3fn).float() / E4M3_UNIT
    )
    assert not {0x7F, 0xFF, 0x80} & set(E4M3.nearest(x).tolist())


def test_an_update_of_nothing_leaves_the_sign_of_0() -> None:
    grid, codes = E4M3.of_block(64), torch.arange(256, dtype=torch.uint8)
    values, scales, noise = grid.decode(codes), torch.ones(4), torch.zeros(256)
    for kernels in (TORCH, kernels_for(torch.device("cpu"))):
        found = torch.empty_like(codes)
        kernels.stochastic(values, grid, scales, Start(codes, values), noise, found)
        assert torch.equal(found, codes)


def test_shapes_are_kept() -> None:
    x = torch.zeros(2, 3)
    assert NF4.nearest(x).shape == NF4.decode(NF4.nearest(x)).shape == (2, 3)
    assert all(codes.shape == (2, 3) for codes in NF4.neighbours(x))


def test_inputs_are_not_changed() -> None:
    x = torch.linspace(-2, 2, 100)
    before = x.clone()
    NF4.nearest(x)
    NF4.neighbours(x)
    block_absmax(x, 64)
    divide_by_scales(x, torch.tensor([2.0, 3.0]), 64)
    assert torch.equal(x, before)


def test_pairs_decode_high_half_first() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    expected = torch.stack((NF4.decode(packed >> 4), NF4.decode(packed & 15)), dim=1).flatten()
    assert torch.equal(NF4.decode_pairs(packed), expected)


def test_the_last_block_may_be_short() -> None:
    values = torch.tensor([1.0, -4.0, 2.0, 0.0, -3.0])
    scales = block_absmax(values, 2)
    assert scales.tolist() == [4.0, 2.0, 3.0]
    out = multiply_by_scales(values, scales, 2, out=torch.empty(5))
    assert out.tolist() == [4.0, -16.0, 4.0, 0.0, -9.0]
    assert divide_by_scales(out, scales, 2).tolist() == values.tolist()


def test_scales_of_zero_and_below_divide_like_their_floor() -> None:
    values, scales = torch.tensor([0.0, 1.0, 1.0, -1.0]), torch.tensor([0.0, -1e-42, 1e-42, -2.0])
    expected = torch.tensor([0.0, -1.0, 1.0, 0.5]) * torch.tensor([1.0, 1e38, 1e38, 1.0])
    torch.testing.assert_close(divide_by_scales(values, scales, 1), expected)


def test_nan_shows_in_its_blocks_scale() -> None:
    values = torch.tensor([1.0, math.nan, 2.0, 1.0, math.nan])
    assert block_absmax(values, 2).isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(("grid", "bits"), [(INT4, 4), (INT8_GROUPS, 8)])
def test_integers_in_groups_are_all_those_of_their_bits(grid: TableGrid, bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)
    half = 2 ** (bits - 1)
    assert torch.equal(grid.decode(codes) * half, torch.arange(-half, half, dtype=torch.float32))
    # The scale of calculate_qparams, times a power of two: absmax / ((2^b - 1) / 2).
    assert grid.reach * half == (2**bits - 1) / 2


def test_a_block_of_another_length_has_the_same_values() -> None:
    assert INT4.of_block(32).values == INT4.values
    assert INT4.of_block(32) != INT4


class _DivisorsOnTheDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it without types
    """Refuses division by a number that CUDA would multiply with the reciprocal of, which has other bits."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and not isinstance(
            args[1], Tensor
        ):
            assert math.frexp(args[1])[0] == 0.5, f"divided by {args[1]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in DENSE])
def test_scales_have_the_bits_of_a_division(name: str) -> None:
    """Starting ones and those stored, of every format, in operations that round alike on a CPU and on CUDA."""
    encoder = encoder_for(name, values := torch.randn(256, 256))
    if encoder.grid is None:
        return
    with _DivisorsOnTheDevice():  # type: ignore[no-untyped-call]
        scales = empty_scales(values.numel(), encoder.grid, values.device)
        encoder.effective_scales(TORCH.starting_scales(values.view(-1), encoder.grid, scales))
