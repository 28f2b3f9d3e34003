"""The compiled kernels and the torch ones give the same bits, whatever they are fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.dtypes import BF16, F16, F32, Dtype
from streamconv.formats.nested_scales import DYNAMIC
from streamconv.kernels import TORCH, Kernels, Start, compiled_kernels, kernels_for
from streamconv.kernels.grids import (
    E2M1,
    E4M3,
    FP4,
    INT4,
    INT8,
    INT8_GROUPS,
    NF4,
    Grid,
    IntegerGrid,
    TableGrid,
    block_absmax,
)
from tests.formats.stored import normal

pytest.importorskip("numba")

GRIDS: Mapping[str, Grid] = {
    "nf4": NF4,
    "fp4": FP4,
    "int8": INT8,
    "dynamic": DYNAMIC,
    "int4": INT4.of_block(32),
    "int4 of rows": INT4.of_block(96),
    "int8 in groups": INT8_GROUPS,
    "e2m1": E2M1,
    "e2m1 of 32": E2M1.of_block(32),
    "e4m3 of rows": E4M3.of_block(96),
    "e4m3 of blocks": E4M3.of_block(16),
    "e4m3 of more than a stretch": E4M3.of_block(600),
    "other": TableGrid("other", (0.25, 1.0, -1.0), 4),
}
every_grid = pytest.mark.parametrize("name", GRIDS)
# Whole blocks only; a short last one; nothing but a short one; an odd number.
SIZES = [(64, 128), (3, 50), (1, 63), (5, 13), (33, 96)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def compiled() -> Kernels:
    found = compiled_kernels()
    assert found is not None
    return found


def grid_of(name: str, columns: int) -> Grid:
    grid = GRIDS[name]
    return grid.of_width(columns) if isinstance(grid, IntegerGrid) else grid


def blocks(count: int, grid: Grid) -> int:
    return -(-count // grid.block)


def bits(tensor: Tensor) -> list[int]:
    """For comparison: NaN equals itself and -0 is not 0."""
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def both(call: Callable[[Kernels], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What both kernels give, once it has been found to be the same."""
    ours, theirs = call(compiled()), call(TORCH)
    for one, other in zip(ours, theirs, strict=True):
        assert bits(one) == bits(other)
    return ours


def empty(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that is not clean."""
    return torch.full((count,), 77, dtype=dtype)


def choose(kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor | None) -> tuple[Tensor, ...]:
    codes = empty(values.numel(), torch.uint8)
    return codes, kernels.nearest(values, grid, scales, codes)


def draw(
    kernels: Kernels, values: Tensor, grid: Grid, scales: Tensor | None, start: Start | None
) -> tuple[Tensor, ...]:
    noise, codes = empty(values.numel()), empty(values.numel(), torch.uint8)
    kernels.uniform(-5, 0, noise)
    return codes, kernels.stochastic(values, grid, scales, start, noise, codes), noise


def codes_for(grid: Grid, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(grid, IntegerGrid):
        return torch.randint(-127, 128, (count,), dtype=torch.int8, generator=generator).view(torch.uint8)
    assert isinstance(grid, TableGrid)
    return torch.randint(0, len(grid.values), (count,), dtype=torch.uint8, generator=generator)


def awkward(grid: Grid, count: int) -> dict[str, Tensor]:
    """Values at and beside the places where codes change, and those that floats are bad at."""
    if isinstance(grid, TableGrid):
        values = torch.tensor(grid.values).sort().values
        turns = torch.cat((values, (values[:-1] + values[1:]) / 2))
    else:
        turns = torch.arange(-127, 127.5, 0.5) / 127
    beside = torch.cat([turns, *(torch.nextafter(turns, torch.tensor(float(way))) for way in (-2, 2))])
    ties = beside.repeat(-(-count // len(beside)))[:count].clone()
    ties[:: grid.block] = 1.0
    random = normal((count,))
    tiny = torch.finfo(torch.float32).smallest_normal
    return {
        "random": random,
        "ties": ties,
        "ties at an awkward scale": ties * 0.0371,
        "zeros": torch.zeros(count),
        "negative zeros": -torch.zeros(count),
        "one block of zeros": torch.where(torch.arange(count) < grid.block, 0.0, random),
        "denormal": random * tiny,
        "under the floor": random * 1e-37,
        "huge": ties * 3e38,
        "huge beside tiny": torch.where(torch.arange(count) % 2 == 0, ties * 3e38, random * tiny),
        "a few": torch.where(torch.arange(count) % 7 == 0, random, -0.0),
    }


def test_the_cpu_computes_with_what_is_compiled() -> None:
    assert kernels_for(torch.device("cpu")) is compiled()
    assert compiled().name == "compiled"


@every_grid
@every_size
def test_nearest_and_stochastic(name: str, size: tuple[int, int]) -> None:
    rows, columns = size
    count, grid = rows * columns, grid_of(name, columns)
    scales = torch.rand(blocks(count, grid)) - 0.5
    scales[0] = 0.0
    start = Start(codes_for(grid, count), normal((count,), 4))
    for values in awkward(grid, count).values():
        both(partial(choose, values=values, grid=grid, scales=None))
        both(partial(choose, values=values, grid=grid, scales=scales))
        both(partial(draw, values=values, grid=grid, scales=None, start=None))
        both(partial(draw, values=values, grid=grid, scales=scales, start=None))
        both(partial(draw, values=values, grid=grid, scales=scales, start=start))


def search(kernels: Kernels, values: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    scales = empty(blocks(values.numel(), grid))
    kernels.search(values, grid, scales)
    return (scales,)


@every_grid
@every_size
def test_search(name: str, size: tuple[int, int]) -> None:
    rows, columns = size
    count, grid = rows * columns, grid_of(name, columns)
    for values in awkward(grid, count).values():
        both(partial(search, values=values, grid=grid))


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    count=st.integers(1, 300),
    words=st.binary(min_size=4, max_size=256),
    size=st.sampled_from([1.0, 1e-30, 1e30]),
)
def test_any_finite_bits(name: str, count: int, words: bytes, size: float) -> None:
    found = np.frombuffer(words[: len(words) // 4 * 4], np.float32)
    values = torch.from_numpy(np.resize(found, count)).nan_to_num(nan=-0.0, posinf=1.0, neginf=-1.0) * size
    values = values.clamp(-3e38, 3e38)
    grid = grid_of(name, 1 + count % 100)
    values = values[: max(1, count // grid.block) * grid.block] if name == "int8" else values
    grid = grid if name != "int8" or values.numel() >= grid.block else grid_of(name, values.numel())
    both(lambda kernels: choose(kernels, values, grid, None))
    both(lambda kernels: draw(kernels, values, grid, None, None))
    start = Start(codes_for(grid, len(values)), values * 1.001)
    both(lambda kernels: draw(kernels, values, grid, block_absmax(values, grid.block), start))


@every_grid
def test_values_that_are_not_finite_show_in_the_scales(name: str) -> None:
    grid = grid_of(name, 128)
    for value in (float("nan"), float("inf"), float("-inf")):
        for word in (0x7FFFFFFF, -1):  # NaN of all bits, either sign
            values = normal((256,))
            values[3] = value
            values[200:201] = torch.tensor([word], dtype=torch.int32).view(torch.float32)
            for kernels in (TORCH, compiled()):
                found = kernels.starting_scales(values, grid, empty(blocks(256, grid)))
                assert not bool(found[[0, 200 // grid.block]].isfinite().any())
                _, scales = choose(kernels, values, grid, None)
                assert found.isfinite().tolist() == scales.isfinite().tolist()


@every_grid
@every_size
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_decode(name: str, size: tuple[int, int], dtype: Dtype) -> None:
    low_first = name.startswith("int4")
    rows, columns = size
    count, grid = rows * columns, grid_of(name, columns)
    codes = codes_for(grid, count)
    for scale in (1.0, 1e-41, 1e-6, 3.4e38):
        scales = normal((blocks(count, grid),)).clamp(-1, 1) * scale

        def decoded(kernels: Kernels, scales: Tensor = scales) -> tuple[Tensor, ...]:
            out, packed, unpacked, paired = (
                empty(count),
                empty(-(-count // 2), torch.uint8),
                codes,
                empty(count),
            )
            kernels.decode(codes, grid, scales, dtype, out)
            if isinstance(grid, TableGrid) and len(grid.values) == 16:
                even = torch.cat((codes, codes[:1]))[: len(packed) * 2]
                kernels.pack_pairs(even, packed, low_first=low_first)
                unpacked = empty(count, torch.uint8)
                kernels.unpack_pairs(packed, unpacked, low_first=low_first)
                kernels.decode_pairs(packed, grid, scales, dtype, paired, low_first=low_first)
                assert bits(paired) == bits(out)
            assert torch.equal(unpacked, codes)
            return out, packed, paired

        out, *_ = both(decoded)
        assert torch.equal(out, out.to(dtype.torch).float())


@pytest.mark.parametrize("name", GRIDS)
def test_decoding_with_a_scale_that_is_not_a_number_gives_none(name: str) -> None:
    grid = grid_of(name, 64)
    codes = torch.ones(64, dtype=torch.uint8)
    for word in (0x7FFFFFFF, -1, 0x7FC00000):
        scales = torch.tensor([word], dtype=torch.int32).view(torch.float32).repeat(blocks(64, grid))
        for dtype in (F32, BF16):
            out = empty(64)
            compiled().decode(codes, grid, scales, dtype, out)
            assert bool(out.isnan().all())


@pytest.mark.parametrize(("first", "count"), [(0, 64), (0, 1), (0, 333), (2, 64), (7, 20), (1 << 40, 130)])
@pytest.mark.parametrize("key", [0, -1, 1 << 62, -(1 << 63)])
def test_uniform(key: int, first: int, count: int) -> None:
    def drawn(kernels: Kernels) -> tuple[Tensor, ...]:
        out = empty(count + 1)
        kernels.uniform(key, first, out[1:])  # not at an address that eight divides
        return (out,)

    both(drawn)


@every_grid
@every_size
def test_sums(name: str, size: tuple[int, int]) -> None:
    rows, columns = size
    count, grid = rows * columns, grid_of(name, columns)
    codes, base, anchor = codes_for(grid, count), normal((count,), 1), normal((count,), 2)
    target = base + normal((count,), 3) / 8

    def sums(kernels: Kernels) -> tuple[Tensor, ...]:
        inner = empty(blocks(count, grid))
        kept = kernels.kept(codes, grid, target, base, anchor, inner)
        return inner, kept, kernels.distance(target, base, grid.block)

    inner, kept, distance = both(sums)
    delta = (target - base).double()
    factors = torch.stack((grid.decode(codes).double(), anchor.double(), delta))
    padded = torch.nn.functional.pad(factors * delta, (0, blocks(count, grid) * grid.block - count))
    terms = padded.view(3, -1, grid.block)
    bound = 9 * 2**-24 * terms.abs().sum(-1)  # a rounding for the product, and one for every halving
    assert bool(((inner.double() - terms[0].sum(-1)).abs() <= bound[0]).all())
    assert bool(((kept - terms[1:].sum((1, 2))).abs() <= bound[1:].sum(-1)).all())
    assert torch.equal(distance, kept[1])


@every_grid
def test_inputs_are_not_changed(name: str) -> None:
    grid = grid_of(name, 96)
    inputs = (normal((960,)), torch.rand(blocks(960, grid)), codes_for(grid, 960), torch.rand(960))
    before = [tensor.clone() for tensor in inputs]
    values, scales, start, noise = inputs
    for kernels in (TORCH, compiled()):
        out, codes, sums = empty(960), empty(960, torch.uint8), empty(blocks(960, grid))
        kernels.nearest(values, grid, scales, codes)
        kernels.stochastic(values, grid, scales, Start(start, noise), noise, codes)
        kernels.decode(start, grid, scales, BF16, out)
        kernels.distance(values, noise, grid.block)
        kernels.kept(start, grid, values, noise, out, sums)
        kernels.starting_scales(values, grid, sums)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("name", ["nf4", "int4", "int8 in groups", "e4m3 of blocks"])
@pytest.mark.parametrize("start", ["first", "all change", "few change"])
@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_settle(name: str, start: str, in_turn: bool, dtype: Dtype) -> None:
    columns, rows = 9, 70
    grid = grid_of(name, rows)
    target, pull = normal((columns, rows), 1), normal((columns, rows), 2) / 9
    scales = target.abs().amax(0).expand(columns, rows).contiguous() + 1e-3
    coupling = normal((columns, columns), 3) / 9
    turns = (normal((rows, rows), 4) / 9).fill_diagonal_(1.0) if in_turn else None
    begun = codes_for(grid, columns * rows).view(columns, rows)
    left = torch.zeros_like(target) if start == "first" else normal((columns, rows), 5) / 99
    if start == "few change":
        still, alone, pull = torch.zeros_like(pull), torch.zeros_like(coupling), pull / 99
        TORCH.quantize_columns(
            target, still, alone, None, grid, scales, dtype, begun, left.zero_(), is_first=True
        )

    def settled(kernels: Kernels) -> tuple[Tensor, ...]:
        codes, errors = begun.clone(), left.clone()
        kernels.quantize_columns(
            target,
            pull.clone(),
            coupling,
            turns,
            grid,
            scales,
            dtype,
            codes,
            errors,
            is_first=start == "first",
        )
        return codes, errors

    codes, errors = both(settled)
    changed = int((codes != begun).count_nonzero())
    assert (0 < changed < 0.2 * codes.numel()) == (start == "few change")
    assert torch.equal(errors, target - (grid.decode(codes) * scales).to(dtype.torch).float())


def test_a_product_with_few_entries_is_added() -> None:
    sparse, matrix, start = normal((9, 70), 1), normal((70, 33), 2), normal((9, 33), 3)
    sparse[normal((9, 70), 4) < 1.5] = 0

    def added(kernels: Kernels) -> tuple[Tensor, ...]:
        out = start.clone()
        kernels.add_product(sparse, matrix, out)
        return (out,)

    (out,) = both(added)
    wanted = start.double() + sparse.double() @ matrix.double()
    assert torch.allclose(out.double(), wanted, rtol=0, atol=1e-5)


@settings(deadline=None)
@given(
    eights=st.integers(1, 5),
    columns=st.integers(1, 40),
    left=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_and_words_are_turned_the_same_way(eights: int, columns: int, left: int, seed: int) -> None:
    """From and to parts of rows, as they are."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(
        -(2**31), 2**31, (8 * eights, columns + left), dtype=torch.int32, generator=generator
    )
    words, places = wide[:, left:], tuple(torch.randperm(8, generator=generator).tolist())

    def quantized(kernels: Kernels) -> tuple[Tensor, ...]:
        plain = empty(columns * 8 * eights, torch.int32).view(columns, -1)
        coded = empty(8 * columns * eights, torch.int32).view(-1, eights)
        back, coded_back = torch.zeros_like(wide), torch.zeros_like(wide)
        kernels.turn_words(words, plain)
        kernels.turn_words(plain, back[:, left:])
        kernels.turn_codes(words, places, coded)
        kernels.turn_codes_back(coded, places, coded_back[:, left:])
        assert torch.equal(back[:, left:], words)
        assert torch.equal(coded_back[:, left:], words)
        assert not back[:, :left].any()
        return plain, coded

    plain, _ = both(quantized)
    assert torch.equal(plain, words.T)
