"""4-bit integers in groups, eight a word, with zero points: what GPTQ and AWQ files have in common.

For a module P with a weight [out, in], `group` columns of a row share a scale and a zero point:

    P.qweight  int32, eight codes a word; in what order, a file's format says
    P.qzeros   int32 [in / group, out / 8], the zero points of eight outputs a word
    P.scales   float16 [in / group, out]

An element is `(code - zero) * scale`, rounded to the type of the scales. A weight is symmetric where every zero point
is 8; only such ones are written, and lie on the grid INT4.

In row form, a row is in / 2 bytes, the first of two codes in the low half: eight codes are then a word of GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import DecodedGrid, TableGrid

MAIN = "qweight"
ZEROS = "qzeros"
SCALES = "scales"
A_WORD = 8  # codes
MIDDLE = 8  # the code of 0 of a symmetric weight
# A code stands for code / 8 - 1 on the grid, so that a scale there is 8 of those stored.
_STEPS = 8.0
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

# Which of eight outputs the bits of a word hold, from the lowest four on.
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def part_name(weight: str, role: str) -> str:
    """`P.qweight` of `P.weight`."""
    return weight.removesuffix("weight") + role


def unpack_words(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """Codes (uint8 [n, 8 m]) of `words` (int32 [n, m])."""
    halves = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    codes = torch.stack((halves & 0xF, halves >> 4), dim=-1).view(*words.shape, A_WORD)
    if places != IN_ORDER:
        codes = codes[..., [places.index(output) for output in range(A_WORD)]]
    return codes.reshape(words.shape[0], -1)


def word_of(zero: int) -> int:
    """The int32 that holds `zero` eight times."""
    word = 0x11111111 * zero
    return word - (1 << 32) if word >> 31 else word


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SymmetricDecoder:
    """`stored_zero` is what `qzeros` hold for the zero point 8, `dtype` the type of products."""

    name: str
    columns: int
    grid: TableGrid
    dtype: Dtype
    order: Order
    stored_zero: int
    main: str = MAIN

    def row_offset(self, row: int) -> int:
        return row * self.columns // 2

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder. Raises CheckpointError where a zero point is not what the first ones are."""
        if not bool((side[ZEROS] == word_of(self.stored_zero)).all()):
            raise CheckpointError(
                f"{part_name(self.name, ZEROS)}: the first zero points are those of a symmetric weight, and others are "
                "not; the checkpoint is damaged, download it again"
            )
        return _finite(self.name, side[SCALES]).T.reshape(-1) * _STEPS

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        return _codes(raw, len(rows) * self.columns)

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        kernels_for(raw.device).decode_pairs(raw, self.grid, scales, self.dtype, out.view(-1), low_first=True)
        return out


@dataclass(frozen=True, slots=True)
class ZeroPointDecoder:
    """`places` tell the order of zero points in words of `qzeros`, which hold them less `subtracted`.

    `groups` is the group of every column (int32), where they do not follow each other: activation order.
    """

    name: str
    columns: int
    grid: DecodedGrid
    dtype: Dtype
    order: Order
    places: tuple[int, ...]
    subtracted: int
    groups: bytes = b""
    main: str = MAIN

    def row_offset(self, row: int) -> int:
        return row * self.columns // 2

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        # Whole words are added, as GPTQModel does: what its writer borrowed from the next field is carried back to it.
        words = side[ZEROS] + word_of(self.subtracted)
        zeros = unpack_words(words, self.places).T.reshape(-1).float()
        return torch.stack((_finite(self.name, side[SCALES]).T.reshape(-1), zeros), dim=1)

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        return _codes(raw, len(rows) * self.columns)

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. The products are exact in float32, and rounded once."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        out.view(-1).copy_(self.codes(raw, rows))
        by_group = scales.view(len(rows), -1, 2)
        if self.groups:
            groups = torch.frombuffer(bytearray(self.groups), dtype=torch.int32).to(raw.device)
            out.sub_(by_group[..., 1].index_select(1, groups)).mul_(by_group[..., 0].index_select(1, groups))
        else:
            grouped = out.view(len(rows), -1, self.grid.block)
            grouped.sub_(by_group[..., 1:]).mul_(by_group[..., :1])
        return out.copy_(out.to(self.dtype.torch))


def _finite(name: str, scales: Tensor) -> Tensor:
    if not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{part_name(name, SCALES)}: a stored scale is NaN or infinite; the checkpoint is damaged,"
            " download it again"
        )
    return scales.float()


def _codes(raw: Tensor, count: int) -> Tensor:
    codes = torch.empty(count, dtype=torch.uint8, device=raw.device)
    kernels_for(raw.device).unpack_pairs(raw, codes, low_first=True)
    return codes


def first_zeros(tensor: StoredTensor, reader: TensorReader) -> Tensor:
    """The first words of `qzeros`, int32; all of them where they are few."""
    raw = torch.empty(min(tensor.nbytes, LOOKED_AT_BYTES) // 4 * 4, dtype=torch.uint8)
    reader.read_into(tensor, 0, tensor_bytes(raw))
    return raw.view(torch.int32)


def group_size_in(parts: Mapping[str, StoredTensor], rows: int, columns: int) -> int:
    """Columns that share a scale. Raises CheckpointError unless the parts have types and shapes that agree."""
    scales, zeros = parts[SCALES], parts[ZEROS]
    count = scales.shape[0] if len(scales.shape) == 2 else 0
    if scales.dtype not in (F16, BF16) or scales.shape != (count, rows) or not count or columns % count:
        raise wrong(scales, f"F16 [groups, {rows}] for {columns} columns")
    if zeros.dtype != I32 or zeros.shape != (count, rows // A_WORD):
        raise wrong(zeros, f"I32 [{count}, {rows // A_WORD}]")
    group = columns // count
    if group % 2:
        raise UnsupportedError(
            f"{scales.name}: groups of {group} columns are not supported; give the 16-bit base model instead"
        )
    return group


def described(name: str, group: int, remarks: Mapping[str, bool]) -> str:
    """The format of a weight: its name, and those of `remarks` that hold, which keep it from being written so."""
    return ", ".join((grouped_name(name, group), *(remark for remark, holds in remarks.items() if holds)))


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SymmetricEncoder:
    """Encoder of a weight [out, in].

    `parts` are `qweight`, `qzeros`, `scales` and those whose bytes `tail` holds. `stored_zero` as in SymmetricDecoder;
    `dtype` is what a 16-bit copy would have.
    """

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    grid: TableGrid
    order: Order
    stored_zero: int
    parts: tuple[TensorSpec, ...]
    tail: tuple[bytes, ...] = ()
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    dequantized_dtype: Dtype = F16
    constants: tuple[Constant, ...] = ()

    def row_offset(self, row: int) -> int:
        return row * self.shape[1] // 2

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        kernels_for(values.device).pack_pairs(values, out, low_first=True)

    def effective_scales(self, scales: Tensor) -> Tensor:
        return (scales / _STEPS).to(torch.float16).float() * _STEPS

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        _, zeros, spec, *_ = self.parts
        if kept is not None:
            return (_bytes(kept[ZEROS]), _bytes(kept[SCALES]), *self.tail)
        assert scales is not None, f"{self.name} was given neither scales nor kept parts"
        stored = (scales.cpu() / _STEPS).to(torch.float16)
        if not bool(stored.isfinite().all()):
            raise InputError(
                f"{self.name} holds NaN, infinity, or values so large that a scale does not fit float16, in which "
                f"{self.format} stores scales; exclude it with --ignore"
            )
        words = torch.full(zeros.shape, word_of(self.stored_zero), dtype=torch.int32)
        groups, rows = spec.shape
        return (_bytes(words), _bytes(stored.view(rows, groups).T), *self.tail)


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


def zeros_and_scales(name: str, shape: Shape, grid: TableGrid) -> tuple[TensorSpec, TensorSpec]:
    rows, columns = shape
    groups = columns // grid.block
    return (
        TensorSpec(part_name(name, ZEROS), I32, (groups, rows // A_WORD)),
        TensorSpec(part_name(name, SCALES), F16, (groups, rows)),
    )


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor_bytes(tensor.cpu().contiguous()))


# -- recognising -------------------------------------------------------------------------------------------


def _check_config(method: str, config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError for other widths than 4 bits and for layouts that are not read."""
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise refusal(config_says(where), f"{method} of {bits} bits")
    keys = ("packing_format", "checkpoint_format", "version", "format")
    layout = next((found for key in keys if isinstance(found := config.get(key), str)), None)
    if layout is not None and layout.lower() not in _LAYOUTS[method]:
        raise refusal(config_says(where), f"{method} in the layout {layout}")


MARKS = Marks(
    side_suffixes=(f".{MAIN}", f".{ZEROS}"),
    methods=MappingProxyType({method: partial(_check_config, method) for method in _LAYOUTS}),
)
