"""Scales that are wished for are stored nearly; those that were stored are stored as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.kernels.ggml import BLOCK_TYPES, BlockType
from streamconv.kernels.ggml.scales import nested_by_masks, nested_in_torch
from tests.kernels.ggml.blocks import WRITTEN, every_written, kernels, random_blocks, same_bits, unpacked

NESTED = [name for name in WRITTEN if (codes := BLOCK_TYPES[name].codes) is not None and codes.is_nested]


def stored(kind: BlockType, wished: Tensor) -> Tensor:
    """Scales as both kernels would store them."""
    one, other = (kernels(where).stored(kind, wished) for where in ("torch", "compiled"))
    assert same_bits(one, other)
    return one


@every_written
def test_what_can_be_stored_is_stored_as_it_is(name: str) -> None:
    """Whatever the bytes were, as long as they are numbers."""
    kind = BLOCK_TYPES[name]
    scales = unpacked("torch", kind, random_blocks(kind, 2000))[1].reshape(2000, -1)
    scales = scales[scales.isfinite().all(1)].reshape(
        -1, *unpacked("torch", kind, random_blocks(kind, 1))[1].shape[1:]
    )
    assert torch.equal(stored(kind, scales), scales)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(WRITTEN),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-12, 1e-8, 1e-4, 1.0, 1e4, 1e9]),
)
def test_what_was_stored_once_is_stored_the_same_again(name: str, seed: int, size: float) -> None:
    kind = BLOCK_TYPES[name]
    assert kind.codes is not None
    shape = (8 * kind.blocks, 2) if kind.codes.has_offset else (8 * kind.blocks,)
    wished = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * size
    if kind.codes.has_offset:
        wished[:, 1].neg_()
    once = stored(kind, wished)
    assert once.isfinite().all()
    assert torch.equal(stored(kind, once), once)


@pytest.mark.parametrize("name", NESTED)
def test_nested_scales_are_near_those_wished_for(name: str) -> None:
    """Half a step of the greatest in the super-block away, at most."""
    kind = BLOCK_TYPES[name]
    assert kind.codes is not None
    wished = torch.rand(100, kind.blocks, generator=torch.Generator().manual_seed(0)) + 0.01
    given = (
        torch.stack((wished, -wished.flip(1)), -1).reshape(-1, 2)
        if kind.codes.has_offset
        else wished.reshape(-1)
    )
    found = stored(kind, given).reshape(100, kind.blocks, -1)
    steps = wished.amax(1, keepdim=True) / kind.codes.scale_limit
    assert bool(((found[..., 0] - wished).abs() <= 0.501 * steps + wished * 1e-3).all())
    if kind.codes.has_offset:
        assert bool(((found[..., 1] + wished.flip(1)).abs() <= 0.501 * steps + wished.flip(1) * 1e-3).all())


def test_an_offset_of_the_other_sign_becomes_zero() -> None:
    kind = BLOCK_TYPES["q4_k"]
    wished = torch.tensor([[0.5, -1.0], [0.5, 0.25], *[[0.5, -0.5]] * 6])
    offsets = stored(kind, wished)[:, 1].tolist()
    assert offsets[0] == pytest.approx(-1, rel=1e-3)
    assert offsets[1] == 0


def test_scales_beyond_16_bit_floats_are_the_greatest_of_them() -> None:
    assert stored(BLOCK_TYPES["q8_0"], torch.tensor([1e9, -1e9])).tolist() == [65504, -65504]


@pytest.mark.parametrize("name", NESTED)
def test_halfway_between_16_bit_floats_the_even_one_is_stored(name: str) -> None:
    """Both kernels round the super-block's factor alike, ordinary or tiny."""
    kind = BLOCK_TYPES[name]
    assert kind.codes is not None
    halves = torch.tensor(
        [1 + 1 / 2048, 1 + 3 / 2048, 1.5 + 1 / 2048, 2**-24 * 0.5, 2**-24 * 1.5, 2**-24 * 2.5]
    )
    wished = (halves * kind.codes.scale_limit).repeat_interleave(kind.blocks)
    given = torch.stack((wished, -wished), -1) if kind.codes.has_offset else -wished
    # With another number beside it, no other factor fits.
    given[:: kind.blocks] *= 0.37
    rounded = [1, 1 + 2 / 1024, 1.5, 0, 2**-23, 2**-23]
    limit = kind.codes.scale_limit
    integers = [limit, limit, limit, 0, limit * 3 // 4, limit]
    found = stored(kind, given).reshape(6, kind.blocks, -1).abs().amax((1, 2))
    assert found.tolist() == [factor * integer for factor, integer in zip(rounded, integers, strict=True)]


@pytest.mark.parametrize(("limit", "is_signed"), [(63, False), (32, True)])
def test_masks_find_what_is_found_for_few_at_a_time(limit: int, is_signed: bool) -> None:
    """Scales that a factor stores exactly, with the greatest at any multiple of it; and any others."""
    generator = torch.Generator().manual_seed(3)
    low = -limit if is_signed else 0
    exact = (
        torch.randint(low, limit, (500, 8), generator=generator)
        * torch.rand(500, 1, generator=generator).half()
    )
    others = torch.randn(100, 8, generator=generator).abs_() if not is_signed else torch.randn(100, 8)
    wished = torch.cat((exact.float(), others, torch.zeros(1, 8), torch.full((1, 8), torch.nan)))
    expected, found = (one(wished, limit, is_signed) for one in (nested_in_torch, nested_by_masks))
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    assert (
        len(set((exact.float().abs().amax(1) / expected[0][:500].abs()).round().tolist())) > 5
    )  # of multiples
