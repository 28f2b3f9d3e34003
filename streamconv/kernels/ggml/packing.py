"""Codes and scales of ggml's types to bytes and back, in torch: what the compiled loops must equal bit for bit.

Codes are uint8 [n, super_block] in two's complement; scales are float32 [n * blocks], or [n * blocks, 2] with offsets.

Source: ggml `ggml-common.h`, the `block_*` structures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from streamconv.kernels.ggml.decoding import (
    codes_q5,
    codes_q5_k,
    codes_q6_k,
    half_at,
    nibbles,
    scales_and_mins,
)
from streamconv.kernels.ggml.types import BlockType, Codes

# First byte of the codes.
CODES_AT = {"q4_0": 2, "q4_1": 4, "q5_0": 2, "q5_1": 4, "q8_0": 2, "q4_k": 16, "q5_k": 16, "q6_k": 0}


def codes_of(kind: BlockType) -> Codes:
    """Codes of a type that we write."""
    assert kind.codes is not None, f"{kind.name} is read only"
    return kind.codes


def pack_codes(kind: BlockType, codes: Tensor, raw: Tensor) -> None:
    """Write codes into super-blocks, uint8 [n, bytes], whose scales stay as they are."""
    counted = codes.view(torch.int8).short() - centre(kind)
    _PACKERS[kind.name](counted.to(torch.uint8), raw[:, CODES_AT[kind.name] :])


def unpack_codes(kind: BlockType, raw: Tensor) -> Tensor:
    """Codes of super-blocks, uint8 [n, super_block]."""
    return (_UNPACKERS[kind.name](raw).short() + centre(kind)).to(torch.uint8)


def centre(kind: BlockType) -> int:
    """The code that is stored as 0; q8_0 stores codes as they are."""
    return 0 if kind.name == "q8_0" else codes_of(kind).lowest


def unpack_scales(kind: BlockType, raw: Tensor) -> Tensor:
    """Scales of super-blocks, as their loader multiplies with them: [n * blocks], or [n * blocks, 2] with offsets."""
    if kind.name in ("q4_k", "q5_k"):
        scales, mins = scales_and_mins(raw[:, 4:16])
        pair = (half_at(raw, 0) * scales.float(), -(half_at(raw, 2) * mins.float()))
        return torch.stack(pair, dim=-1).reshape(-1, 2)
    if kind.name == "q6_k":
        return (half_at(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8).float()).reshape(-1)
    if codes_of(kind).has_offset:
        return torch.cat((half_at(raw, 0), half_at(raw, 2)), dim=1)
    return half_at(raw, 0).reshape(-1)


def pack_scales(kind: BlockType, factors: Tensor, integers: Tensor, raw: Tensor) -> None:
    """Write what `split` gives: 16-bit floats [n, 1 or 2], integers int16 [n, blocks, 1 or 2]."""
    halves = factors.half().view(torch.uint8)
    if kind.name == "q6_k":
        raw[:, 208:210] = halves
        raw[:, 192:208] = integers.reshape(-1, 16).to(torch.uint8)
        return
    raw[:, : halves.shape[1]] = halves
    if codes_of(kind).is_nested:
        scales, mins = integers.to(torch.uint8).unbind(-1)
        low, high = torch.split(scales, 4, dim=1)
        low_min, high_min = torch.split(mins, 4, dim=1)
        raw[:, 4:8] = low | (high >> 4) << 6
        raw[:, 8:12] = low_min | (high_min >> 4) << 6
        raw[:, 12:16] = high & 15 | (high_min & 15) << 4


def _pack_nibbles(codes: Tensor, stretch: int, out: Tensor) -> None:
    first, second = codes.reshape(codes.shape[0], -1, 2, stretch).unbind(2)
    out.copy_((first & 15 | (second & 15) << 4).reshape(codes.shape[0], -1))


def _pack_q4(codes: Tensor, out: Tensor) -> None:
    _pack_nibbles(codes, 16, out)


def _in_bytes(parts: Tensor, width: int) -> Tensor:
    """Bit fields [..., fields, k] of `width` bits in one byte each, the first lowest: [..., k]."""
    steps = torch.arange(0, 8, width, dtype=torch.uint8, device=parts.device)
    return (parts << steps.unsqueeze(-1)).sum(-2).to(torch.uint8)


def _pack_q5(codes: Tensor, out: Tensor) -> None:
    out[:, :4] = _in_bytes((codes >> 4).reshape(-1, 4, 8, 1), 1).reshape(-1, 4)
    _pack_nibbles(codes, 16, out[:, 4:])


def _pack_q8(codes: Tensor, out: Tensor) -> None:
    out.copy_(codes)


def _pack_q4_k(codes: Tensor, out: Tensor) -> None:
    _pack_nibbles(codes, 32, out)


def _pack_q5_k(codes: Tensor, out: Tensor) -> None:
    out[:, :32] = _in_bytes((codes >> 4).reshape(-1, 8, 32), 1)
    _pack_nibbles(codes, 32, out[:, 32:])


def _pack_q6_k(codes: Tensor, out: Tensor) -> None:
    _pack_nibbles(codes, 64, out[:, :128])
    out[:, 128:192] = _in_bytes((codes >> 4).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)


def _unpack_q8(raw: Tensor) -> Tensor:
    return raw[:, 2:]


_PACKERS: Mapping[str, Callable[[Tensor, Tensor], None]] = {
    "q4_0": _pack_q4,
    "q4_1": _pack_q4,
    "q5_0": _pack_q5,
    "q5_1": _pack_q5,
    "q8_0": _pack_q8,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
}
_UNPACKERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q4_0": lambda raw: nibbles(raw[:, 2:], 16),
    "q4_1": lambda raw: nibbles(raw[:, 4:], 16),
    "q5_0": lambda raw: codes_q5(raw, 2),
    "q5_1": lambda raw: codes_q5(raw, 4),
    "q8_0": _unpack_q8,
    "q4_k": lambda raw: nibbles(raw[:, 16:], 32),
    "q5_k": codes_q5_k,
    "q6_k": codes_q6_k,
}
