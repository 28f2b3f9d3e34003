"""Codes and scales go into ggml's bytes and come out again; both kernels make the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.kernels.ggml import BLOCK_TYPES, BlockType
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
    random_blocks,
    same_bits,
    unpacked,
)


def values_of(kind: BlockType, codes: Tensor, scales: Tensor) -> Tensor:
    """What codes stand for, by the definition."""
    integers = codes.view(torch.int8).float().reshape(-1, kind.block)
    if scales.dim() == 1:
        return (scales.unsqueeze(1) * integers).reshape(codes.shape)
    return (scales[:, :1] * integers + scales[:, 1:]).reshape(codes.shape)


@every_written
@both_kernels
def test_codes_and_scales_stand_for_what_is_decoded(name: str, where: str) -> None:
    kind = BLOCK_TYPES[name]
    raw = random_blocks(kind, 300)
    assert same_bits(values_of(kind, *unpacked(where, kind, raw)), decoded(where, kind, raw))


@every_written
@both_kernels
def test_blocks_of_ggml_are_packed_as_ggml_packed_them(name: str, where: str) -> None:
    kind, raw = BLOCK_TYPES[name], golden_blocks(name)
    codes, scales = unpacked(where, kind, raw)
    assert kind.codes is not None
    integers = codes.view(torch.int8)
    assert kind.codes.lowest <= int(integers.min())
    assert int(integers.max()) <= kind.codes.highest
    assert torch.equal(packed(where, kind, codes, scales), raw)


@every_written
@both_kernels
def test_codes_alone_are_replaced(name: str, where: str) -> None:
    kind = BLOCK_TYPES[name]
    raw, other = random_blocks(kind, 50), random_blocks(kind, 50, seed=1)
    changed = raw.clone()
    kernels(where).pack_codes(kind, unpacked(where, kind, other)[0], changed)
    codes, scales = unpacked(where, kind, changed)
    assert torch.equal(codes, unpacked(where, kind, other)[0])
    assert same_bits(scales, unpacked(where, kind, raw)[1])
    kernels(where).pack_codes(kind, unpacked(where, kind, raw)[0], changed)
    assert torch.equal(changed, raw)


@every_written
def test_both_kernels_make_the_same_bytes(name: str) -> None:
    kind, raw = BLOCK_TYPES[name], random_blocks(BLOCK_TYPES[name], 300)
    (codes, scales), (others, same) = unpacked("torch", kind, raw), unpacked("compiled", kind, raw)
    assert torch.equal(codes, others)
    assert same_bits(scales, same)
    finite = scales.reshape(raw.shape[0], -1).isfinite().all(1)
    per_block = scales.reshape(raw.shape[0], kind.blocks, -1)[finite].reshape(-1, *scales.shape[1:])
    one, other = (packed(where, kind, codes[finite], per_block) for where in ("torch", "compiled"))
    assert torch.equal(one, other)


@every_written
@both_kernels
def test_nearest_codes_leave_at_most_half_a_step(name: str, where: str) -> None:
    kind = BLOCK_TYPES[name]
    values = in_super_blocks(kind, golden_weights())
    scales = unpacked(where, kind, golden_blocks(name))[1]
    codes = nearest(where, kind, values, scales)
    assert torch.equal(codes, nearest("torch", kind, values, scales))
    assert kind.codes is not None
    integers = codes.view(torch.int8).reshape(-1, kind.block)
    inside = (integers > kind.codes.lowest) & (integers < kind.codes.highest)
    steps = scales.reshape(-1, 1) if scales.dim() == 1 else scales[:, :1]
    inside &= steps != 0
    errors = (values_of(kind, codes, scales) - values).reshape(-1, kind.block).abs()
    assert bool((errors <= steps.abs() * 0.5001)[inside].all())
    assert inside.any()


@both_kernels
def test_a_scale_of_zero_has_the_code_zero(where: str) -> None:
    kind = BLOCK_TYPES["q8_0"]
    codes = nearest(where, kind, torch.ones(2, 32), torch.tensor([0.0, 0.5]))
    assert codes.tolist() == [[0] * 32, [2] * 32]
