"""Decoding of ggml's types in torch, for any device: what the compiled loops must equal bit for bit.

Each function takes super-blocks, uint8 [n, bytes], and returns their values, float32 [n, super_block]. Operations and
their order are those of ggml's `dequantize_row_*` and of gguf-py, each rounded to float32.

Source: ggml `ggml-quants.c`; gguf-py 0.19.0 `quants.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from streamconv.kernels.ggml.iq_grids import IQ_TYPES, iq_grid
from streamconv.kernels.ggml.types import BlockType

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice those of OCP's E2M1; scales are halved.
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_QUARTER, _HALF, _EIGHTH = 0.25, 0.5, 0.125


def decode_super_blocks(kind: BlockType, raw: Tensor) -> Tensor:
    """Values of super-blocks: uint8 [n, bytes] -> float32 [n, super_block]."""
    return _DECODERS[kind.name](raw).reshape(raw.shape[0], kind.super_block)


def half_at(raw: Tensor, place: int) -> Tensor:
    """16-bit floats that begin at byte `place` of each super-block, as float32 [n, 1]."""
    return raw[:, place : place + 2].contiguous().view(torch.float16).float()


def integers_at(raw: Tensor, place: int, count: int, width: int) -> Tensor:
    """`count` unsigned integers of `width` bytes, the lowest first, as int64 [n, count]."""
    read = raw[:, place : place + count * width].reshape(raw.shape[0], count, width).long()
    return (read << torch.arange(0, 8 * width, 8, device=raw.device)).sum(-1)


def fields(packed: Tensor, shifts: range, mask: int) -> Tensor:
    """Bit fields of every entry: [..., k] -> [..., fields, k], those of the first shift before those of the next."""
    steps = torch.tensor(list(shifts), dtype=packed.dtype, device=packed.device)
    return packed.unsqueeze(-2) >> steps.unsqueeze(-1) & mask


def fields_in_turn(packed: Tensor, shifts: range, mask: int) -> Tensor:
    """Bit fields of every entry: [..., k] -> [..., k * fields], those of the first entry before those of the next."""
    steps = torch.tensor(list(shifts), dtype=packed.dtype, device=packed.device)
    return (packed.unsqueeze(-1) >> steps & mask).flatten(-2)


def nibbles(packed: Tensor, stretch: int) -> Tensor:
    """Codes of 4 bits, [n, 2 * bytes]: `stretch` of them lie in the low halves of as many bytes, then as many above."""
    return fields(packed.reshape(packed.shape[0], -1, stretch), range(0, 8, 4), 15).reshape(
        packed.shape[0], -1
    )


def scaled(factor: Tensor, codes: Tensor) -> Tensor:
    """Values of codes [n, blocks * block] with a factor a block [n, blocks]."""
    return factor.unsqueeze(-1) * codes.float().reshape(*factor.shape, -1)


def codes_q5(raw: Tensor, place: int) -> Tensor:
    """Codes of q5_0 and q5_1, whose high bits are the 32 bits at `place` and whose low bits follow."""
    high = fields_in_turn(raw[:, place : place + 4], range(8), 1)
    return nibbles(raw[:, place + 4 :], 16) | high << 4


def scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """6-bit scales and mins of q4_k and q5_k, of 12 bytes: uint8 [n, 8] each."""
    low, middle, high = torch.split(packed, 4, dim=1)
    scales = torch.cat((low & 63, high & 15 | (low >> 2 & 48)), dim=1)
    mins = torch.cat((middle & 63, high >> 4 | (middle >> 2 & 48)), dim=1)
    return scales, mins


def codes_q5_k(raw: Tensor) -> Tensor:
    high = fields(raw[:, 16:48], range(8), 1).reshape(raw.shape[0], -1)
    return nibbles(raw[:, 48:], 32) | high << 4


def codes_q6_k(raw: Tensor) -> Tensor:
    """Codes of q6_k, from 0 to 63."""
    high = fields(raw[:, 128:192].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(raw.shape[0], -1)
    return nibbles(raw[:, :128], 64) | high << 4


def _f32(raw: Tensor) -> Tensor:
    return raw.view(torch.float32)


def _f16(raw: Tensor) -> Tensor:
    return raw.view(torch.float16).float()


def _bf16(raw: Tensor) -> Tensor:
    return raw.view(torch.bfloat16).float()


def _q4_0(raw: Tensor) -> Tensor:
    return half_at(raw, 0) * (nibbles(raw[:, 2:], 16).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return half_at(raw, 0) * nibbles(raw[:, 4:], 16).float() + half_at(raw, 2)


def _q5_0(raw: Tensor) -> Tensor:
    return half_at(raw, 0) * (codes_q5(raw, 2).float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    return half_at(raw, 0) * codes_q5(raw, 4).float() + half_at(raw, 2)


def _q8_0(raw: Tensor) -> Tensor:
    return half_at(raw, 0) * raw[:, 2:].contiguous().view(torch.int8).float()


def _q2_k(raw: Tensor) -> Tensor:
    scales = half_at(raw, 80) * (raw[:, :16] & 15).float()
    mins = half_at(raw, 82) * (raw[:, :16] >> 4).float()
    codes = fields(raw[:, 16:80].reshape(-1, 2, 32), range(0, 8, 2), 3)
    return scaled(scales, codes) - mins.unsqueeze(-1)


def _q3_k(raw: Tensor) -> Tensor:
    packed = raw[:, 96:108]
    low = fields(packed[:, :8], range(0, 8, 4), 15).reshape(-1, 16)
    high = fields(packed[:, 8:], range(0, 8, 2), 3).reshape(-1, 16)
    scales = half_at(raw, 108) * ((low | high << 4).float() - 32)
    codes = fields(raw[:, 32:96].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(raw.shape[0], -1)
    is_high = fields(raw[:, :32], range(8), 1).reshape(raw.shape[0], -1)
    return scaled(scales, codes.float() - (1 - is_high.float()) * 4)


def _with_mins(raw: Tensor, codes: Tensor) -> Tensor:
    scales, mins = scales_and_mins(raw[:, 4:16])
    return scaled(half_at(raw, 0) * scales.float(), codes) - (half_at(raw, 2) * mins.float()).unsqueeze(-1)


def _q4_k(raw: Tensor) -> Tensor:
    return _with_mins(raw, nibbles(raw[:, 16:], 32))


def _q5_k(raw: Tensor) -> Tensor:
    return _with_mins(raw, codes_q5_k(raw))


def _q6_k(raw: Tensor) -> Tensor:
    scales = half_at(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return scaled(scales, codes_q6_k(raw).float() - 32)


@functools.cache
def ternary_digits() -> Tensor:
    """Digits less 1 that a byte of tq1_0 stands for, float32 [5, 256].

    A byte is five ternary digits, or four, as a fraction of 256: times a power of 3, the next digit leads.
    """
    powers = torch.tensor([1, 3, 9, 27, 81]).unsqueeze(1)
    return (((torch.arange(256) * powers & 255) * 3 >> 8) - 1).float()


def _tq1_0(raw: Tensor) -> Tensor:
    digits = ternary_digits().to(raw.device)

    def part(first: int, last: int, count: int) -> Tensor:
        return digits[:count, raw[:, first:last].long()].transpose(0, 1).reshape(raw.shape[0], -1)

    return half_at(raw, 52) * torch.cat((part(0, 32, 5), part(32, 48, 5), part(48, 52, 4)), dim=1)


def _tq2_0(raw: Tensor) -> Tensor:
    codes = fields(raw[:, :64].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(raw.shape[0], -1)
    return half_at(raw, 64) * (codes.float() - 1)


def _looked_up(values: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.long()]


@functools.cache
def powers_of_two() -> Tensor:
    """Half of what a byte of E8M0 stands for, float32 [256]: 2 to the power of byte - 128."""
    return torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128).float()


@functools.cache
def small_floats() -> Tensor:
    """Half of what a byte of unsigned E4M3 stands for, float32 [256]; the sign bit is not looked at, 127 is 0."""
    byte = torch.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).double()
    subnormal = mantissa * 2.0**-9
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    values = torch.where(exponent == 0, subnormal, normal) * 0.5
    values[[0, 127]] = 0
    return values.float()


def _mxfp4(raw: Tensor) -> Tensor:
    scale = powers_of_two().to(raw.device)[raw[:, :1].long()]
    return scale * _looked_up(FP4_VALUES, nibbles(raw[:, 1:], 16))


def _nvfp4(raw: Tensor) -> Tensor:
    scales = small_floats().to(raw.device)[raw[:, :4].long()]
    return scaled(scales, _looked_up(FP4_VALUES, nibbles(raw[:, 4:], 8)))


def _iq4_nl(raw: Tensor) -> Tensor:
    return half_at(raw, 0) * _looked_up(IQ4_VALUES, nibbles(raw[:, 2:], 16))


def _iq4_xs(raw: Tensor) -> Tensor:
    high = fields_in_turn(raw[:, 2:4], range(0, 8, 2), 3)
    low = fields_in_turn(raw[:, 4:8], range(0, 8, 4), 15)
    scales = half_at(raw, 0) * ((low | high << 4).float() - 32)
    return scaled(scales, _looked_up(IQ4_VALUES, nibbles(raw[:, 8:], 16)))


def _from_grid(name: str, factor: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """Entries of a table times a factor a block, some negated: [n, blocks], [n, entries], bytes of bits [n, 32]."""
    entries = iq_grid(name).to(index.device)[index.long()].reshape(*factor.shape, -1)
    values = (factor.unsqueeze(-1) * entries).reshape(index.shape[0], -1)
    return values * (1 - 2 * fields_in_turn(signs, range(8), 1).float())


def _with_parity(signs: Tensor) -> Tensor:
    """Seven signs and an eighth that makes the number of negative ones even, as a byte of bits."""
    parity = signs
    for shift in (4, 2, 1):
        parity = parity ^ parity >> shift
    return signs | (parity & 1) << 7


def _iq2_xxs(raw: Tensor) -> Tensor:
    words = integers_at(raw, 2, 16, 4)[:, 1::2]
    factor = half_at(raw, 0) * (_HALF + (words >> 28).float()) * _QUARTER
    index = raw[:, 2:].reshape(-1, 8, 8)[..., :4].reshape(-1, 32)
    return _from_grid("iq2_xxs", factor, index, _with_parity(fields_in_turn(words, range(0, 28, 7), 127)))


def _iq2_xs(raw: Tensor) -> Tensor:
    words = integers_at(raw, 2, 32, 2)
    factor = half_at(raw, 0) * (_HALF + fields_in_turn(raw[:, 66:], range(0, 8, 4), 15).float()) * _QUARTER
    return _from_grid("iq2_xs", factor, words & 511, _with_parity(words >> 9))


def _iq2_s(raw: Tensor) -> Tensor:
    factor = half_at(raw, 0) * (_HALF + fields_in_turn(raw[:, 74:], range(0, 8, 4), 15).float()) * _QUARTER
    high = fields_in_turn(raw[:, 66:74], range(0, 8, 2), 3).long()
    return _from_grid("iq2_s", factor, raw[:, 2:34] | high << 8, raw[:, 34:66])


def _iq3_xxs(raw: Tensor) -> Tensor:
    words = integers_at(raw, 66, 8, 4)
    factor = half_at(raw, 0) * (_HALF + (words >> 28).float()) * _HALF
    return _from_grid(
        "iq3_xxs", factor, raw[:, 2:66], _with_parity(fields_in_turn(words, range(0, 28, 7), 127))
    )


def _iq3_s(raw: Tensor) -> Tensor:
    factor = half_at(raw, 0) * (1 + 2 * fields_in_turn(raw[:, 106:], range(0, 8, 4), 15).float())
    high = fields_in_turn(raw[:, 66:74], range(8), 1).long()
    return _from_grid("iq3_s", factor, raw[:, 2:66] | high << 8, raw[:, 74:106])


def _shifted(name: str, factor: Tensor, index: Tensor, is_negative: Tensor) -> Tensor:
    """Entries plus or minus an eighth, times a factor: [n, blocks], [n, entries], [n, shifts]."""
    shift = _EIGHTH - 2 * _EIGHTH * is_negative.float()
    entries = iq_grid(name).to(index.device)[index].reshape(*shift.shape, -1) + shift.unsqueeze(-1)
    return factor.unsqueeze(-1) * entries.reshape(*factor.shape, -1)


def _iq1_s(raw: Tensor) -> Tensor:
    words = integers_at(raw, 34, 8, 2)
    factor = half_at(raw, 0) * (2 * (words >> 12 & 7) + 1).float()
    index = raw[:, 2:34] | fields_in_turn(words, range(0, 12, 3), 7) << 8
    return _shifted("iq1_s", factor, index, words >> 15)


def _iq1_m(raw: Tensor) -> Tensor:
    """Four high bits of each of four words of scales are the 16-bit float."""
    words = integers_at(raw, 48, 4, 2)
    places = torch.arange(0, 16, 4, device=raw.device)
    bits = ((words >> 12) << places).sum(1, keepdim=True)
    whole = torch.cat((bits & 255, bits >> 8), dim=1).to(torch.uint8).view(torch.float16).float()
    factor = whole * (2 * fields_in_turn(words, range(0, 12, 3), 7) + 1).float()
    high = fields_in_turn(raw[:, 32:48], range(0, 8, 4), 15).long()
    return _shifted("iq1_m", factor, raw[:, :32] | (high & 7) << 8, high >> 3)


_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
}
assert set(IQ_TYPES) <= set(_DECODERS)
