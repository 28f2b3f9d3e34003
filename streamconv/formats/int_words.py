"""Integers of 4 or 8 bits in groups, with zero points, in words of 32 bits: what GPTQ and AWQ files have in common.

For a module P with a weight [out, in], `group` columns of a row share a scale and a zero point:

    P.qweight  int32, eight codes of 4 bits a word, or four of 8; in what order, a file's format says
    P.qzeros   int32 [in / group, out * bits / 32], the zero points of as many outputs a word
    P.scales   float16 [in / group, out]

An element is `(code - zero) * scale`, rounded to the type of the scales. A weight is symmetric where every zero point
is the middle one, 8 of 4 bits: it lies on the grid INT4. On that of others, blocks have offsets: -zero * scale.

In row form, a row is in * bits / 8 bytes, of two codes the first in the low half: a word is then one of GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import BF16, DENSE, F16, I32, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    Constant,
    Marks,
    Order,
    config_says,
    grouped_name,
    refusal,
    wrong,
)
from streamconv.formats.bits import packed_bits, unpacked_bits
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import INT4, INT8_GROUPS, TableGrid, divided

MAIN = "qweight"
ZEROS = "qzeros"
SCALES = "scales"
A_WORD = 8  # codes
LOOKED_AT_BYTES = 2**16
"""Bytes of zero points looked at when planning, of large weights the first ones only; all when a weight is read."""

# What the formats of weights may be called beside, whose codes and scales could be stored as they are written here.
NO_GROUPS = "no g_idx"
STORED_OTHERWISE = (NO_GROUPS,)

# Values of `quant_method` whose tensors are these, and the names of their layouts that are read.
_LAYOUTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "gptq": frozenset({"gptq", "gptq_v2"}),
        "awq": frozenset({"gemm"}),
        "auto-round": frozenset(
            {"auto_round:auto_gptq", "auto_round:gptq", "auto_round:auto_awq", "auto_round:awq"}
        ),
    }
)


def part_name(weight: str, role: str) -> str:
    """`P.qweight` of `P.weight`."""
    return weight.removesuffix("weight") + role


def unpack_words(words: Tensor, places: tuple[int, ...], bits: int = 4) -> Tensor:
    """Codes (uint8 [n, 32 / bits * m]) of `words` (int32 [n, m]), which hold `places` from the lowest bit on."""
    count = 32 // bits
    halves = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    codes = halves if bits == 8 else torch.stack((halves & 0xF, halves >> 4), dim=-1).flatten(-2)
    if places != tuple(range(count)):
        codes = codes[..., [places.index(output) for output in range(count)]]
    return codes.reshape(words.shape[0], -1)


def pack_words(codes: Tensor, places: tuple[int, ...], bits: int = 4) -> Tensor:
    """Undo `unpack_words`: int32 [n, m] of uint8 [n, 32 / bits * m]."""
    count = 32 // bits
    found = codes.view(codes.shape[0], -1, count)[..., list(places)]
    halves = found if bits == 8 else found[..., 0::2] | found[..., 1::2] << 4
    return halves.contiguous().view(torch.int32).view(codes.shape[0], -1)


def word_of(zero: int, bits: int = 4) -> int:
    """The int32 that holds `zero` in all of its fields."""
    word = (0x11111111 if bits == 4 else 0x01010101) * zero
    return word - (1 << 32) if word >> 31 else word


@dataclass(frozen=True, slots=True)
class ZeroPoints:
    """Rule of zero points from `least` on, of codes up to `greatest`: a group's range, with 0 in it, over all codes."""

    least: int
    greatest: int

    def start(self, values: Tensor) -> Tensor:
        """See Offsets. A scale of the grid is half as many stored ones as there are codes."""
        low, high = kernels_for(values.device).ranges(values, values.shape[1])
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = divided(high - low, self.greatest)
        # A group of zeros has the scale of one from -1 to 1.
        scale = torch.where(scale == 0, torch.full_like(scale, 2 / self.greatest), scale)
        return torch.stack((scale * (self.greatest + 1) / 2, low), dim=1)

    def nearest(self, scales: Tensor, stored: Tensor) -> Tensor:
        """Zero points, float32, of blocks with offsets [blocks, 2], whose `stored` scales are one a block."""
        steps = torch.where(stored == 0, torch.zeros_like(stored), -scales[:, 1] / stored)
        return steps.round_().clamp_(self.least, self.greatest)


def grid_of(bits: int, group: int, zero_points: ZeroPoints | None, order: bytes = b"") -> TableGrid:
    """The integers of so many bits, in groups; see ZeroPoints, and `order` in Grid."""
    known = INT4 if bits == 4 else INT8_GROUPS
    reach = known.reach if zero_points is None else 1.0
    return replace(known, block=group, offsets=zero_points, order=order, reach=reach)


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Words:
    """Layout of a file's words: bits of a code, the outputs that a word of zero points holds, and what these are less.

    `subtracted` is 1 where the file has zero points less one, as GPTQ v1 does.
    """

    bits: int
    places: tuple[int, ...]
    subtracted: int

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return 1 << self.bits - 1

    def zeros(self, words: Tensor) -> Tensor:
        """Zero points (float32, one a block of a row) of `qzeros`."""
        # Whole words are added, as GPTQModel does: what its writer borrowed from the next field is carried back to it.
        found = unpack_words(words + word_of(self.subtracted, self.bits), self.places, self.bits)
        return found.T.reshape(-1).float()

    def stored_zeros(self, zeros: Tensor) -> Tensor:
        """`qzeros`, int32 [groups, words], of zero points (float32 [out, groups])."""
        codes = (zeros - self.subtracted).to(torch.uint8).T.contiguous()
        return pack_words(codes, self.places, self.bits)


@dataclass(frozen=True, slots=True)
class IntWordsDecoder:
    """Decoder of words; `dtype` is the type of products, which is that of the scales."""

    name: str
    columns: int
    grid: TableGrid
    dtype: Dtype
    order: Order
    words: Words
    main: str = MAIN

    def row_offset(self, row: int) -> int:
        return row * self.columns * self.words.bits // 8

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder. Raises CheckpointError where a weight that began as a symmetric one is none."""
        scales = _finite(self.name, side[SCALES]).T.reshape(-1)
        if self.grid.offsets is not None:
            return torch.stack((scales * self.words.middle, -self.words.zeros(side[ZEROS]) * scales), dim=1)
        middle = word_of(self.words.middle - self.words.subtracted, self.words.bits)
        if not bool((side[ZEROS] == middle).all()):
            raise CheckpointError(
                f"{part_name(self.name, ZEROS)}: the first zero points are those of a symmetric weight, and others are "
                "not; the checkpoint is damaged, download it again"
            )
        return scales * self.words.middle

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        return unpacked_bits(raw, self.words.bits, len(rows) * self.columns)

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Differences and products are exact in float32, and rounded once."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        kernels, into = kernels_for(raw.device), out.view(-1)
        if self.words.bits == 4 and self.grid.offsets is None and not self.grid.order:
            kernels.decode_pairs(raw, self.grid, scales, self.dtype, into, low_first=True)
        else:
            kernels.decode(self.codes(raw, rows), self.grid, scales, self.dtype, into)
        return out


def _finite(name: str, scales: Tensor) -> Tensor:
    if not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{part_name(name, SCALES)}: a stored scale is NaN or infinite; the checkpoint is damaged,"
            " download it again"
        )
    return scales.float()


def first_zeros(tensor: StoredTensor, reader: TensorReader) -> Tensor:
    """The first words of `qzeros`, int32; all of them where they are few."""
    raw = torch.empty(min(tensor.nbytes, LOOKED_AT_BYTES) // 4 * 4, dtype=torch.uint8)
    reader.read_into(tensor, 0, tensor_bytes(raw))
    return raw.view(torch.int32)


def group_size_in(parts: Mapping[str, StoredTensor], rows: int, columns: int, bits: int = 4) -> int:
    """Columns that share a scale. Raises CheckpointError unless the parts have types and shapes that agree."""
    scales, zeros = parts[SCALES], parts[ZEROS]
    count = scales.shape[0] if len(scales.shape) == 2 else 0
    if scales.dtype not in (F16, BF16) or scales.shape != (count, rows) or not count or columns % count:
        raise wrong(scales, f"F16 [groups, {rows}] for {columns} columns")
    if zeros.dtype != I32 or zeros.shape != (count, rows * bits // 32):
        raise wrong(zeros, f"I32 [{count}, {rows * bits // 32}]")
    group = columns // count
    if group % 2:
        raise UnsupportedError(
            f"{scales.name}: groups of {group} columns are not supported; give the 16-bit base model instead"
        )
    return group


def stored_groups(tensor: StoredTensor | None, group: int, reader: TensorReader) -> bytes:
    """The group of every column (int32), where it is not what it is without activation order; else nothing."""
    if tensor is None:
        return b""
    found, columns = reader.load(tensor), tensor.shape[0]
    count = columns // group
    if bool((found < 0).any()) or bool((found >= count).any()):
        raise wrong(tensor, f"groups from 0 to {count - 1}")
    if torch.equal(found, plain_groups(columns, group)):
        return b""
    if not bool((found.long().bincount(minlength=count) == group).all()):
        raise UnsupportedError(
            f"{tensor.name}: groups have different numbers of columns, which is not read; give the 16-bit base model "
            "instead"
        )
    return bytes(tensor_bytes(found))


def columns_in_order(groups: bytes) -> bytes:
    """Columns (int32), group after group."""
    if not groups:
        return b""
    found = torch.frombuffer(bytearray(groups), dtype=torch.int32)
    return bytes(tensor_bytes(torch.argsort(found, stable=True).to(torch.int32)))


def plain_groups(columns: int, group: int) -> Tensor:
    """The group of every column without activation order, int32."""
    return torch.arange(columns, dtype=torch.int32) // group


def described(name: str, group: int, remarks: Mapping[str, bool]) -> str:
    """The format of a weight: its name, and those of `remarks` that hold, which keep it from being written so."""
    return ", ".join((grouped_name(name, group), *(remark for remark, holds in remarks.items() if holds)))


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IntWordsEncoder:
    """Encoder of a weight [out, in].

    `parts` are `qweight`, `qzeros`, `scales` and those whose bytes `tail` holds; `dtype` is what a 16-bit copy would
    have, `product` the type of scales.
    """

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    grid: TableGrid
    order: Order
    words: Words
    parts: tuple[TensorSpec, ...]
    tail: tuple[bytes, ...] = ()
    product: Dtype = F16
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    constants: tuple[Constant, ...] = ()

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.product

    def row_offset(self, row: int) -> int:
        return row * self.shape[1] * self.words.bits // 8

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        packed_bits(values, self.words.bits, out)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        if self.grid.offsets is None:
            return self._stored(scales).float() * self.words.middle
        stored = self._stored(scales[:, 0]).float()
        return torch.stack((stored * self.words.middle, -self._zeros(scales, stored) * stored), dim=1)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        _, zeros, spec, *_ = self.parts
        if kept is not None:
            return (_bytes(kept[ZEROS]), _bytes(kept[SCALES]), *self.tail)
        assert scales is not None, f"{self.name} was given neither scales nor kept parts"
        groups, rows = spec.shape
        scales = scales.cpu()
        stored = self._stored(scales if self.grid.offsets is None else scales[:, 0].contiguous())
        if not bool(stored.isfinite().all()):
            raise InputError(
                f"{self.name} holds NaN, infinity, or values so large that a scale does not fit {self.product.name}, "
                f"in which {self.format} stores scales; exclude it with --ignore"
            )
        if self.grid.offsets is None:
            middle = word_of(self.words.middle - self.words.subtracted, self.words.bits)
            words = torch.full(zeros.shape, middle, dtype=torch.int32)
        else:
            words = self.words.stored_zeros(self._zeros(scales, stored.float()).view(rows, groups))
        return (_bytes(words), _bytes(stored.view(rows, groups).T), *self.tail)

    def _stored(self, scales: Tensor) -> Tensor:
        return (scales / self.words.middle).to(self.product.torch)

    def _zeros(self, scales: Tensor, stored: Tensor) -> Tensor:
        """Zero points, float32, one a block."""
        points = self.grid.offsets
        assert isinstance(points, ZeroPoints)
        return points.nearest(scales, stored)


def is_whole(shape: Shape, rows: int, group: int) -> bool:
    """Whether a matrix has outputs in a multiple of `rows`, and inputs in whole groups."""
    return len(shape) == 2 and min(shape) > 0 and not shape[0] % rows and not shape[1] % group


def check_encodes(name: str, shape: Shape, dtype: Dtype, format_name: str, rows: int, group: int) -> None:
    """Raise UnsupportedError where a format with words of so many `rows` cannot store a weight."""
    if dtype.name not in DENSE:
        raise UnsupportedError(
            f"{name} is {dtype}; {format_name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
        )
    if not name.endswith(".weight") or not is_whole(shape, rows, group):
        raise UnsupportedError(
            f"{name} has shape {list(shape)}; {format_name} stores matrices of modules whose outputs are a multiple of "
            f"{rows}, and inputs of {group}: exclude it with --ignore"
        )


def zeros_and_scales(
    name: str, shape: Shape, group: int, bits: int = 4, product: Dtype = F16
) -> tuple[TensorSpec, TensorSpec]:
    rows, columns = shape
    groups = columns // group
    return (
        TensorSpec(part_name(name, ZEROS), I32, (groups, rows * bits // 32)),
        TensorSpec(part_name(name, SCALES), product, (groups, rows)),
    )


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor_bytes(tensor.cpu().contiguous()))


# -- recognising -------------------------------------------------------------------------------------------


def _check_config(method: str, config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError where no module has 4 or 8 bits, and for layouts that are not read."""
    bits = config.get("bits", config.get("w_bit", 4))
    dynamic = config.get("dynamic") if method == "gptq" else None
    of_modules = dynamic.values() if isinstance(dynamic, Mapping) else ()
    known = (4,) if method == "awq" else (4, 8)
    # Those of other bits are copied, where some are read.
    if all(each not in known for each in (bits, *(rule.get("bits") for rule in of_modules if rule))):
        raise refusal(config_says(where), f"{method} of {bits} bits")
    keys = ("packing_format", "checkpoint_format", "version", "format")
    layout = next((found for key in keys if isinstance(found := config.get(key), str)), None)
    if layout is not None and layout.lower() not in _LAYOUTS[method]:
        raise refusal(config_says(where), f"{method} in the layout {layout}")


MARKS = Marks(
    side_suffixes=(f".{MAIN}", f".{ZEROS}"),
    methods=MappingProxyType({method: partial(_check_config, method) for method in _LAYOUTS}),
)
