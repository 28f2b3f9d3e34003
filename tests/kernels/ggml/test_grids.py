"""Grids of ggml's types stand for the very values that the types' own kernels decode."""

from __future__ import annotations

import pytest
import torch

from streamconv.dtypes import F32
from streamconv.kernels import TORCH, kernels_for
from streamconv.kernels.ggml import BLOCK_TYPES, BlockType, block_kernels_for
from streamconv.kernels.ggml.grids import as_loaded, grid_of, half, in_grid_units, packed, stored

CPU = torch.device("cpu")
WRITTEN = [kind for kind in BLOCK_TYPES.values() if kind.codes is not None]
each_type = pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)


def some(kind: BlockType, count: int = 6) -> torch.Tensor:
    """Values of whole super-blocks, flat, one of them zeros."""
    values = torch.randn(count, kind.super_block, generator=torch.Generator().manual_seed(3))
    values[1] = 0
    return values.flatten()


@each_type
@pytest.mark.parametrize("searches", [False, True])
def test_what_is_packed_decodes_to_the_values_of_the_grid(kind: BlockType, searches: bool) -> None:
    values, grid = some(kind), grid_of(kind)
    assert grid.rule is not None
    scales = grid.rule.fit(values, None) if searches else grid.rule.start(values.view(-1, kind.block))
    assert torch.equal(stored(kind, scales), scales)
    codes = torch.empty(values.shape, dtype=torch.uint8)
    kernels_for(CPU).nearest(values, grid, scales, codes)
    expected, raw = torch.empty_like(values), torch.empty(values.numel() // kind.super_block, kind.bytes)
    kernels_for(CPU).decode(codes, grid, scales, F32, expected)
    raw = raw.to(torch.uint8)
    packed(kind, codes, scales, raw.view(-1))
    found = torch.empty(len(raw), kind.super_block)
    block_kernels_for(CPU).decode(kind, raw, found)
    assert torch.equal(found.flatten(), expected)
    error = float((values - found.flatten()).square().mean())
    assert error < 0.5 / half(kind) ** 2


@each_type
def test_kernels_of_any_grid_take_the_type_s_own_rules(kind: BlockType) -> None:
    values, grid = some(kind), grid_of(kind)
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(4))
    assert grid.rule is not None
    for kernels in (TORCH, kernels_for(CPU)):
        found = torch.empty_like(grid.rule.fit(values, weights))
        kernels.search(values, grid, found, weights)
        assert torch.equal(found, grid.rule.fit(values, weights))
        kernels.starting_scales(values, grid, found)
        assert torch.equal(found, grid.rule.start(values.view(-1, kind.block)))


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_errors_of_great_values_count_more_where_nothing_else_weighs_them(name: str) -> None:
    kind = BLOCK_TYPES[name]
    values, rule = some(kind, 64), grid_of(kind).rule
    assert rule is not None
    blocks = values.view(-1, kind.block)
    weights = blocks.abs() + blocks.square().mean(1, keepdim=True).sqrt()
    found, alike = rule.fit(values, None), rule.fit(values, torch.ones_like(values))
    assert not torch.equal(found, alike)
    weighted, others = (float((weights * error_of(kind, blocks, each)).sum()) for each in (found, alike))
    assert weighted < 0.995 * others


def test_nearest_rounding_of_q6_k_searches() -> None:
    kind = BLOCK_TYPES["q6_k"]
    values, rule = some(kind), grid_of(kind).rule
    assert rule is not None
    assert torch.equal(rule.start(values.view(-1, kind.block)), rule.fit(values, None))
    plain = block_kernels_for(CPU).starting_scales(kind, values.view(-1, kind.super_block))
    assert not torch.equal(as_loaded(kind, rule.start(values.view(-1, kind.block))), plain)


def error_of(kind: BlockType, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Squared error of every value, its code the nearest."""
    values, grid = blocks.reshape(-1), grid_of(kind)
    codes, found = torch.empty(values.shape, dtype=torch.uint8), torch.empty_like(values)
    kernels_for(CPU).nearest(values, grid, scales, codes)
    kernels_for(CPU).decode(codes, grid, scales, F32, found)
    return (values - found).square().view(blocks.shape)


@each_type
def test_units_are_powers_of_two(kind: BlockType) -> None:
    scales = torch.randn(8, 2)[:, : 2 if grid_of(kind).offsets else 1].squeeze(1)
    assert torch.equal(as_loaded(kind, in_grid_units(kind, scales)), scales)


@each_type
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_a_super_block_beyond_16_bit_floats_has_no_scale(kind: BlockType, bad: float) -> None:
    values, grid = some(kind), grid_of(kind)
    values[2 * kind.super_block] = bad
    assert grid.rule is not None
    for scales in (grid.rule.fit(values, None), grid.rule.start(values.view(-1, kind.block))):
        by_super_block = stored(kind, scales).reshape(6, -1)
        assert not by_super_block[2].isfinite().any()
        assert by_super_block[[0, 1, 3, 4, 5]].isfinite().all()
        raw = torch.zeros(6 * kind.bytes, dtype=torch.uint8)
        packed(kind, torch.zeros(values.shape, dtype=torch.uint8), stored(kind, scales), raw)
