"""Loops over blocks with offsets and scattered columns give the bits of the torch kernels, whatever they are fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.checkpoint.reader import tensor_bytes
from streamconv.dtypes import BF16, F16, F32, Dtype
from streamconv.formats import mlx
from streamconv.formats.gptq import zero_points_of
from streamconv.formats.int_words import grid_of
from streamconv.kernels import TORCH, Kernels, compiled_kernels
from streamconv.kernels.grids import INT4, NF4, TableGrid, empty_scales

pytest.importorskip("numba")

COLUMNS = 128
CPU = torch.device("cpu")
ORDER = bytes(
    tensor_bytes(torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.int32))
)
GRIDS: dict[str, TableGrid] = {
    **{f"mlx{bits}": mlx.grid_of(bits, 32) for bits in (2, 3, 4, 5, 6, 8)},
    "zero points": grid_of(4, 64, zero_points_of(4, is_v2=False)),
    "zero points, 8 bit, scattered": grid_of(8, 32, zero_points_of(8, is_v2=True), ORDER),
    "scattered": dataclasses.replace(INT4, block=32, order=ORDER),
    "scattered, offsets": grid_of(4, 64, zero_points_of(4, is_v2=True), ORDER),
    "scattered, uneven steps": dataclasses.replace(NF4, block=64, order=ORDER),
}
each_grid = pytest.mark.parametrize("name", GRIDS)


def same(call: Callable[[Kernels], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What both kernels give, once it has been found to be the same: -0 is not 0, and NaN is NaN."""
    compiled = compiled_kernels()
    assert compiled is not None
    ours, theirs = call(compiled), call(TORCH)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert bits(one) == bits(other)
    return ours


def bits(tensor: Tensor) -> bytes:
    """All of it; of NaN only that it is one."""
    known = torch.where(tensor.isnan(), torch.nan, tensor) if tensor.is_floating_point() else tensor
    return bytes(tensor_bytes(known.contiguous()))


def floats(rows: int, words: bytes, size: float, *, finite: bool = True) -> Tensor:
    """Numbers of every magnitude, blocks of zeros of either sign, and one whose numbers are alike: [rows, COLUMNS]."""
    drawn = np.random.default_rng(list(words)).standard_normal((rows, COLUMNS)).astype(
        np.float32
    ) * np.float32(size)
    given = np.frombuffer(words + bytes(-len(words) % 4), np.float32)[: COLUMNS // 2]
    drawn[0, : given.size] = given
    drawn[-1, 64:96] = 0.0
    drawn[-1, 96:] = -0.0 if words and words[0] % 2 else np.float32(size)
    found = torch.from_numpy(drawn)
    return found.nan_to_num(0.0, 3e38, -3e38).clamp(-1e38, 1e38) if finite else found


anything = given(st.integers(1, 5), st.binary(max_size=256), st.sampled_from([1e-42, 1e-30, 0.02, 1.0, 1e30]))


@anything
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_ranges(block: int, rows: int, words: bytes, size: float) -> None:
    values = floats(rows, words, size, finite=False).view(-1)
    values[3 : 3 + rows] = torch.tensor([0x7FC00000, -1, -0x800000], dtype=torch.int32).view(torch.float32)[
        rows % 3
    ]
    low, high = same(lambda kernels: kernels.ranges(values, block))
    for number, each in enumerate(values.view(-1, block)):
        if bool(each.isnan().any()):
            assert bool(low[number].isnan() & high[number].isnan())
        else:
            assert (low[number], high[number]) == (each.min(), each.max())
    assert not bool(torch.signbit(torch.cat([low, high])[torch.cat([low, high]) == 0]).any())


@each_grid
@anything
@settings(max_examples=15, deadline=None)
def test_nearest_and_decode(name: str, rows: int, words: bytes, size: float) -> None:
    values, grid = floats(rows, words, size).view(-1), GRIDS[name]

    def call(kernels: Kernels) -> tuple[Tensor, ...]:
        scales = empty_scales(values.numel(), grid, CPU)
        kernels.starting_scales(values, grid, scales)
        codes, chosen = (torch.empty(values.numel(), dtype=torch.uint8) for _ in range(2))
        found = kernels.nearest(values, grid, None, codes)
        # As a file might hold them: rounded, of either sign, some 0.
        stored = scales.clamp(-1e30, 1e30).bfloat16().float()
        kernels.nearest(values, grid, stored, chosen)
        out = []
        for dtype in (F32, BF16, F16):
            out.append(torch.empty_like(values))
            kernels.decode(chosen, grid, stored, dtype, out[-1])
        return scales, found, codes, chosen, *out

    same(call)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_product_and_sum_are_rounded_each(width: int, dtype: Dtype) -> None:
    grid, drawn = mlx.grid_of(width, 32), torch.Generator().manual_seed(width)
    codes = torch.randint(0, 2**width, (64 * COLUMNS,), generator=drawn).to(torch.uint8)
    scales = torch.randn(codes.numel() // 32, 2, generator=drawn).to(dtype.torch).float() * 2 ** (width - 1)

    def call(kernels: Kernels) -> tuple[Tensor, ...]:
        out = torch.empty(codes.numel())
        kernels.decode_in_steps(codes, grid, scales, dtype, out)
        return (out,)

    (out,) = same(call)
    step, offset = (scales[:, :1] / 2 ** (width - 1)).to(dtype.torch), scales[:, 1:].to(dtype.torch)
    expected = codes.view(-1, 32).to(dtype.torch) * step + offset
    assert torch.equal(out.view(-1, 32), expected.float())


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
def test_columns_are_taken_and_put_back(kind: torch.dtype) -> None:
    columns = torch.frombuffer(bytearray(ORDER), dtype=torch.int32)
    matrix = (torch.rand(7, COLUMNS) * 250).to(kind)

    def call(kernels: Kernels) -> tuple[Tensor, ...]:
        taken, back = torch.empty_like(matrix), torch.empty_like(matrix)
        kernels.take_columns(matrix, columns, taken)
        kernels.put_columns(taken, columns, back)
        return taken, back

    taken, back = same(call)
    assert torch.equal(taken, matrix[:, columns.long()])
    assert torch.equal(back, matrix)


@pytest.mark.parametrize("width", [2, 3, 5, 6])
def test_bits_are_packed_one_after_the_other(width: int) -> None:
    codes = torch.randint(0, 2**width, (800,), generator=torch.Generator().manual_seed(width)).to(torch.uint8)

    def call(kernels: Kernels) -> tuple[Tensor, ...]:
        packed, back = torch.empty(100 * width, dtype=torch.uint8), torch.empty_like(codes)
        kernels.pack_bits(codes, width, packed)
        kernels.unpack_bits(packed, width, back)
        return packed, back

    packed, back = same(call)
    assert torch.equal(back, codes)
    number = sum(int(code) << width * place for place, code in enumerate(codes))
    assert bytes(tensor_bytes(packed)) == number.to_bytes(100 * width, "little")
