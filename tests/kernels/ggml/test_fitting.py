"""Scales that are searched for beat ggml's own quantizer, and both kernels find the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamconv.kernels.ggml import BLOCK_TYPES
from tests.kernels.ggml.blocks import (
    both_kernels,
    decoded,
    every_written,
    golden_blocks,
    golden_weights,
    in_super_blocks,
    kernels,
    nearest,
    packed,
    same_bits,
)


def after_a_round_trip(where: str, name: str, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Values fitted, rounded, packed and decoded."""
    kind = BLOCK_TYPES[name]
    blocks = in_super_blocks(kind, values)
    scales = kernels(where).fit(kind, blocks, None if weights is None else in_super_blocks(kind, weights))
    raw = packed(where, kind, nearest(where, kind, blocks, scales), scales)
    return decoded(where, kind, raw).reshape(values.shape)


def error(values: Tensor, found: Tensor, weights: Tensor | None = None) -> float:
    squares = (found.double() - values.double()).square()
    return float((squares if weights is None else squares * weights).sum())


def normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02


@every_written
def test_the_squared_error_is_below_that_of_ggml(name: str) -> None:
    values, kind = golden_weights(), BLOCK_TYPES[name]
    theirs = decoded("compiled", kind, golden_blocks(name)).reshape(values.shape)
    ours = after_a_round_trip("compiled", name, values)
    assert error(values, ours) < 0.98 * error(values, theirs)


@every_written
def test_starting_scales_put_the_range_on_the_codes(name: str) -> None:
    """Both kernels, in blocks with zeros of either sign and in constant ones, too."""
    kind = BLOCK_TYPES[name]
    blocks = in_super_blocks(kind, golden_weights())
    blocks[0, :3] = -0.0
    one, other = (kernels(where).starting_scales(kind, blocks) for where in ("torch", "compiled"))
    assert torch.equal(one, other)
    assert torch.equal(kernels("torch").stored(kind, one), one)
    found = decoded("torch", kind, packed("torch", kind, nearest("torch", kind, blocks, one), one))
    fitted = after_a_round_trip("compiled", name, blocks)
    assert error(blocks, fitted) < error(blocks, found) < 3 * error(blocks, fitted)


@every_written
def test_both_kernels_find_the_same_scales(name: str) -> None:
    kind = BLOCK_TYPES[name]
    values = golden_weights()
    values[0, :256] = 0
    values[1, 256:] *= 1e-9
    blocks = in_super_blocks(kind, values)
    weights = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0))
    weights.reshape(-1)[:600] = 0
    for importance in (None, weights):
        one, other = (kernels(where).fit(kind, blocks, importance) for where in ("torch", "compiled"))
        assert same_bits(one, other)
        assert one.isfinite().all()


@every_written
def test_weights_move_the_error_to_where_it_matters_less(name: str) -> None:
    values = normal(4096)
    weights = torch.rand(4096, generator=torch.Generator().manual_seed(1)) ** 4
    plain, weighed = (after_a_round_trip("compiled", name, values, w) for w in (None, weights))
    assert error(values, weighed, weights) < error(values, plain, weights)
    assert error(values, weighed) > error(values, plain)


@every_written
@both_kernels
def test_weights_of_one_are_no_weights(name: str, where: str) -> None:
    kind = BLOCK_TYPES[name]
    blocks = in_super_blocks(kind, normal(1024))
    plain, weighed = (kernels(where).fit(kind, blocks, w) for w in (None, torch.ones_like(blocks)))
    assert same_bits(plain, weighed)


@every_written
@both_kernels
def test_rows_can_be_weighed_alike(name: str, where: str) -> None:
    """Importance is known of columns."""
    kind = BLOCK_TYPES[name]
    blocks = in_super_blocks(kind, normal(4 * 512).reshape(4, 512))
    row = in_super_blocks(kind, torch.rand(512, generator=torch.Generator().manual_seed(0)))
    alike, apart = (kernels(where).fit(kind, blocks, w) for w in (row, row.repeat(4, 1)))
    assert same_bits(alike, apart)
    assert not same_bits(alike, kernels(where).fit(kind, blocks, None))


@every_written
def test_scales_that_were_fitted_can_be_stored(name: str) -> None:
    kind = BLOCK_TYPES[name]
    scales = kernels("compiled").fit(kind, in_super_blocks(kind, golden_weights()), None)
    assert torch.equal(kernels("compiled").stored(kind, scales), scales)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_weights_that_lie_on_the_grid_stay_there(name: str) -> None:
    values = decoded("compiled", BLOCK_TYPES[name], golden_blocks(name)).reshape(golden_weights().shape)
    assert error(values, after_a_round_trip("compiled", name, values)) == 0


@every_written
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_a_constant_is_kept(name: str, value: float) -> None:
    values = torch.full((256,), value)
    assert after_a_round_trip("compiled", name, values).tolist() == pytest.approx([value] * 256, rel=2e-3)


def test_skewed_blocks_come_near_the_best_of_all_scales_and_offsets() -> None:
    """A few elements far above the others, which do best between two codes' values."""
    name = "q5_1"
    kind = BLOCK_TYPES[name]
    assert kind.codes is not None
    values = torch.randn(48 * 32, generator=torch.Generator().manual_seed(3)).mul(1.5).exp_()
    found = after_a_round_trip("compiled", name, values).view(48, 32)
    blocks, highest = values.view(48, 1, 1, 32), kind.codes.highest
    low, high = values.view(48, 32).aminmax(dim=1)
    step = ((high - low) / highest)[:, None] * torch.linspace(0.85, 1.1, 48)
    offset = low[:, None, None] + step[:, :, None] * torch.linspace(-1, 0.5, 48)
    codes = ((blocks - offset[..., None]) / step[:, :, None, None]).round().clamp(0, highest)
    tried = (codes * step[:, :, None, None] + offset[..., None] - blocks).square().sum(-1)
    best = tried.view(48, -1).amin(1)
    lost = (found - values.view(48, 32)).square().sum(1) / best
    assert float(lost.mean()) < 1.1
