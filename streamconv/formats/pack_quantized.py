"""compressed-tensors' pack-quantized storage: integers of 4 or 8 bits, a scale for every group of a row.

Source: compressed-tensors `compressors/pack_quantized` and `quantization/utils/helpers.py`. For a module P with a
weight [out, in] and groups of g elements of a row:

    P.weight_packed  int32 [out, ⌈in * bits / 32⌉], code k of a row from bit k * bits on, the lowest bit first
    P.weight_scale   [out, in / g], or [out, 1] for whole rows, in the weight's own dtype
    P.weight_shape   int64 [2], out and in
    P.weight_zero_point  int32 [⌈out * bits / 32⌉, in / g], where a group has a zero point; packed along the outputs
    P.weight_g_idx       int32 [in], the group of each input in activation order; all -1 where there is none

A code stands for code - zero, of which zero is 2^(bits - 1) where none is stored, and an element is that times its
scale, rounded once, to the scale's dtype. Release 0.17 has activation order, 0.20 has none any more, nor has vLLM 0.32.

How a file is stored, its tensors tell; config.json is checked against them, because loaders go by it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import DENSE, F32, I8, I32, I64, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    GROUP_SIZES,
    USUAL_GROUP_SIZE,
    Constant,
    Json,
    Marks,
    Order,
    Weight,
    config_says,
    grouped_name,
    parts_of,
    wrong,
)
from streamconv.formats.compressed import (
    METHOD,
    InGroups,
    arguments,
    part_of,
    weights_of,
)
from streamconv.formats.int_words import (
    ZeroPoints,
    columns_in_order,
    described,
    grid_of,
    pack_words,
    stored_groups,
    unpack_words,
)
from streamconv.formats.pack_schemes import BITS, STORAGE, Scheme, Settings, read_schemes, read_settings
from streamconv.formats.undecoded import find_each
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid
from streamconv.kernels.ordered import columns_of

MAIN = "weight_packed"
SCALES = "weight_scale"
SHAPE = "weight_shape"
ZEROS = "weight_zero_point"
GROUPS = "weight_g_idx"
_STORAGES = frozenset({STORAGE})
_WORD_BITS = 32
# By whether groups have zero points of their own.
_NAMES = ("w4a16", "w4a16-asym")


def _part_name(weight: str, role: str) -> str:
    """`P.weight_scale` of `P.weight`."""
    return weight.removesuffix("weight") + role


def _words(columns: int, bits: int) -> int:
    """int32 of a row."""
    return -(-columns * bits // _WORD_BITS)


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackQuantizedDecoder:
    """Decoder of packed rows; `dtype` is that of the scales, and of what is decoded."""

    name: str
    dtype: Dtype
    columns: int
    bits: int
    grid: TableGrid
    main: str = MAIN
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return row * _words(self.columns, self.bits) * I32.itemsize

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        half, stored = 1 << self.bits - 1, side[SCALES].reshape(-1).float()
        scales = stored * half
        if self.grid.offsets is not None:
            zeros = unpacked_zeros(side[ZEROS], self.bits, side[SCALES].shape[0])
            scales = torch.stack((scales, -zeros * stored), dim=1)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{_part_name(self.name, SCALES)}: a stored scale is NaN or infinite; the checkpoint is damaged, "
                "download it again"
            )
        return scales

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        """See Decoder. The last word of a row may hold codes of nothing."""
        count = len(rows)
        stored = raw.numel() * 8 // self.bits
        codes = raw
        if self.bits == 4:
            codes = torch.empty(stored, dtype=torch.uint8, device=raw.device)
            kernels_for(raw.device).unpack_pairs(raw, codes, low_first=True)
        if stored == count * self.columns:
            return codes
        return codes.view(count, -1)[:, : self.columns].reshape(-1)

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals dequantize bit for bit."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        kernels, into = kernels_for(raw.device), out.view(-1)
        if self.grid.offsets is not None and self.dtype == F32:
            return self._in_float32(self.codes(raw, rows), scales, out)
        is_plain = self.grid.offsets is None and not self.grid.order
        if self.bits == 4 and is_plain and raw.numel() * 2 == into.numel():
            kernels.decode_pairs(raw, self.grid, scales, self.dtype, into, low_first=True)
        else:
            kernels.decode(self.codes(raw, rows), self.grid, scales, self.dtype, into)
        return out

    def _in_float32(self, codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        """Differences times their scales, rounded once: products added have no bits to spare in float32."""
        places = torch.arange(self.columns, dtype=torch.int32, device=codes.device)
        groups = places // self.grid.block
        if self.grid.order:
            groups[columns_of(self.grid.order, codes.device).long()] = groups.clone()
        stored = scales[:, 0] / 2 ** (self.bits - 1)
        zeros = zero_points_of(self.bits).nearest(scales, stored)
        by_column = [each.view(len(out), -1).index_select(1, groups) for each in (zeros, stored)]
        torch.mul(codes.view(out.shape) - by_column[0], by_column[1], out=out)
        return out


def zero_points_of(bits: int) -> ZeroPoints:
    """Zero points that files can have: any code."""
    return ZeroPoints(least=0, greatest=2**bits - 1)


def unpacked_zeros(words: Tensor, bits: int, rows: int) -> Tensor:
    """Zero points, float32, one a group of a row, of `weight_zero_point` for so many rows."""
    # A single word of rows would else have the strides of what it was turned from.
    turned = words.mT.clone(memory_format=torch.contiguous_format)
    codes = unpack_words(turned, tuple(range(_WORD_BITS // bits)), bits)
    return codes[:, :rows].mT.reshape(-1).float()


def packed_zeros(zeros: Tensor, bits: int) -> Tensor:
    """`weight_zero_point`, int32 [words, groups], of zero points (float32 [out, groups])."""
    a_word = _WORD_BITS // bits
    codes = torch.zeros((zeros.shape[1], -(-zeros.shape[0] // a_word) * a_word), dtype=torch.uint8)
    codes[:, : zeros.shape[0]] = zeros.T
    return pack_words(codes, tuple(range(a_word)), bits).T


def _find_weight(
    packed: str, bits: int, settings: Settings, free: Mapping[str, StoredTensor], reader: TensorReader
) -> Weight | None:
    """The weight whose main part is `packed`; None if its codes are of other `bits`.

    Raises CheckpointError unless its parts are whole and agree, UnsupportedError where it is stored as is not read.
    """
    name = packed.removesuffix(MAIN) + "weight"
    beside = [role for role in (ZEROS, GROUPS) if _part_name(name, role) in free]
    roles = (MAIN, SCALES, SHAPE, *beside)
    parts = parts_of(name, {role: _part_name(name, role) for role in roles}, free)
    rows, columns = _read_shape(parts[SHAPE], reader)
    if bits != _bits(parts[MAIN], rows, columns):
        return None
    scales = parts[SCALES]
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    is_whole = groups > 0 and columns % groups == 0
    if scales.dtype.name not in DENSE or scales.shape != (rows, groups) or not is_whole:
        raise wrong(scales, f"a float type and [{rows}, groups] for groups of the {columns} columns")
    zeros, group = parts.get(ZEROS), columns // groups
    if zeros is not None:
        _check_zeros(zeros, settings, (-(-rows * bits // _WORD_BITS), groups))
    order = _order(parts.get(GROUPS), settings, columns, group, reader)
    grid = grid_of(bits, group, None if zeros is None else zero_points_of(bits), order)
    decoder = PackQuantizedDecoder(name, scales.dtype, columns, bits, grid)
    kind, shape = _kind(bits, grid), (rows, columns)
    is_written = zeros is None and group in GROUP_SIZES and not order
    keep = None if is_written else _keep(kind, decoder, shape)
    return Weight(name, shape, scales.dtype, kind, decoder, parts, keep)


def _check_zeros(tensor: StoredTensor, settings: Settings, shape: Shape) -> None:
    if not settings.has_zeros:
        raise UnsupportedError(
            f"{tensor.name} is there, and config.json says that all weights are symmetric, by which loaders leave zero "
            "points out; correct it, or give the 16-bit base model instead"
        )
    if tensor.dtype == I8:
        raise UnsupportedError(
            f"{tensor.name}: its zero points are not packed, as in files of compressed-tensors 0.9.2 and before, "
            "which loaders of today do not take either; give the 16-bit base model instead"
        )
    if tensor.dtype != I32 or tensor.shape != shape:
        raise wrong(tensor, f"I32 {list(shape)}, zero points packed along the outputs")


def _order(
    tensor: StoredTensor | None, settings: Settings, columns: int, group: int, reader: TensorReader
) -> bytes:
    """Columns in activation order; nothing where groups are of columns that follow each other."""
    if tensor is None:
        return b""
    if tensor.dtype != I32 or tensor.shape != (columns,):
        raise wrong(tensor, f"I32 [{columns}]")
    if bool((reader.load(tensor) == -1).all()):
        return b""
    groups = stored_groups(tensor, group, reader)
    if groups and not settings.has_order:
        raise UnsupportedError(
            f"{tensor.name} is there, and config.json has no weights in activation order (actorder group), by which "
            "loaders leave it out; correct it, or give the 16-bit base model instead"
        )
    return columns_in_order(groups)


def _read_shape(tensor: StoredTensor, reader: TensorReader) -> tuple[int, int]:
    if tensor.dtype not in (I64, I32) or tensor.shape != (2,):
        raise wrong(tensor, "I64 [2]")
    rows, columns = reader.load(tensor).tolist()
    if rows < 1 or columns < 1:
        raise CheckpointError(
            f"{tensor.file.name}: {tensor.name}: found {[rows, columns]}, expected positive"
        )
    return rows, columns


def _bits(tensor: StoredTensor, rows: int, columns: int) -> int:
    """Bits of a code of `tensor`. Raises CheckpointError where it is of none that fits."""
    fitting = [bits for bits in BITS if tensor.shape == (rows, _words(columns, bits))]
    if tensor.dtype != I32 or not fitting:
        expected = " or ".join(f"[{rows}, {_words(columns, bits)}]" for bits in BITS)
        raise wrong(tensor, f"I32 {expected} for 4 or 8 bits of [{rows}, {columns}]")
    if len(fitting) > 1:
        raise UnsupportedError(
            f"{tensor.name}: rows of {columns} are too short to tell 4 bits from 8; give the 16-bit base model instead"
        )
    return fitting[0]


def _kind(bits: int, grid: TableGrid, *, of_rows: bool = False) -> str:
    """The format of a weight; `of_rows`: with a scale a row, which only a base keeps."""
    has_zeros = grid.offsets is not None
    remarks = {
        "a scale a row": of_rows,
        "with zero points": has_zeros and bits != 4,
        "in activation order": bool(grid.order),
    }
    plain = _NAMES[has_zeros] if bits == 4 else f"w{bits}a16"
    return described(plain, USUAL_GROUP_SIZE if of_rows else grid.block, remarks)


def _in_rows(weight: Weight) -> Weight:
    """The weight, as one of those with a scale a row."""
    decoder = weight.decoder
    if not isinstance(decoder, PackQuantizedDecoder):
        return weight
    kind = _kind(decoder.bits, decoder.grid, of_rows=True)
    return replace(weight, format=kind, keep=_keep(kind, decoder, weight.shape))


def _keep(kind: str, decoder: PackQuantizedDecoder, shape: Shape) -> PackQuantizedEncoder:
    """Encoder of a base's own layout, beside whose parts others are copied."""
    return PackQuantizedEncoder(
        kind, decoder.name, shape, decoder.dtype, decoder.bits, decoder.grid, writes_shape=False
    )


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackQuantizedEncoder:
    """Encoder of a weight [out, in] of whole groups, with scales of its own `dtype`.

    `writes_shape`: False where the base's tensor is copied, as it may be of another type.
    """

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    bits: int
    grid: TableGrid
    writes_shape: bool = True
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    order: Order | None = None

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        rows, columns = self.shape
        groups = columns // self.grid.block
        zeros = TensorSpec(_part_name(self.name, ZEROS), I32, (_words(rows, self.bits), groups))
        return (
            TensorSpec(_part_name(self.name, MAIN), I32, (rows, _words(columns, self.bits))),
            *((zeros,) if self.grid.offsets is not None else ()),
            TensorSpec(_part_name(self.name, SCALES), self.dtype, (rows, groups)),
        )

    @property
    def constants(self) -> tuple[Constant, ...]:
        if not self.writes_shape:
            return ()
        content = struct.pack("<2q", *self.shape)
        return (Constant(TensorSpec(_part_name(self.name, SHAPE), I64, (2,)), content),)

    def row_offset(self, row: int) -> int:
        return row * _words(self.shape[1], self.bits) * I32.itemsize

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        if self.bits == 4:
            kernels_for(values.device).pack_pairs(values, out, low_first=True)
        else:
            out.copy_(values)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder. Scales are of the grid, whose greatest magnitude is 1: a power of two times the stored ones."""
        half = 1 << self.bits - 1
        if self.grid.offsets is None:
            return self._stored(scales).float().mul(half)
        stored = self._stored(scales[:, 0]).float()
        return torch.stack((stored * half, -self._zeros(scales) * stored), dim=1)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        zeros = None
        if kept is not None:
            found, zeros = kept[SCALES], kept.get(ZEROS)
        else:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            scales = scales.cpu()
            found = self._stored(scales if self.grid.offsets is None else scales[:, 0])
            if self.grid.offsets is not None:
                points = self._zeros(scales).view(self.shape[0], -1)
                zeros = packed_zeros(points, self.bits)
        if not bool(found.isfinite().all()):
            raise InputError(
                f"{self.name} holds NaN or infinity, or values too large for a scale of {self.dtype.name}, which "
                f"{self.format} cannot store"
            )
        parts = (found,) if zeros is None else (zeros, found)
        return tuple(bytes(tensor_bytes(each.cpu().contiguous())) for each in parts)

    def _zeros(self, scales: Tensor) -> Tensor:
        """Zero points by scales before these are rounded, as compressed-tensors has them: errors are smaller."""
        return zero_points_of(self.bits).nearest(scales, scales[:, 0] / (1 << self.bits - 1))

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.div(2 ** (self.bits - 1)).to(self.dtype.torch)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    read_schemes(part_of(config, _STORAGES), config_says(where))


def _check_described(weights: Iterable[Weight], config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a weight that is stored as config.json says of none."""
    schemes = read_schemes(part_of(config, _STORAGES), where)
    for weight in weights:
        decoder = weight.decoder
        if isinstance(decoder, PackQuantizedDecoder):
            block = decoder.grid.block
            is_row = block == decoder.columns  # one group, or a scale a row: the same tensors
            stored = Scheme(decoder.bits, block, decoder.grid.offsets is None)
            if stored not in schemes and not (is_row and replace(stored, group_size=None) in schemes):
                raise CheckpointError(
                    f"{where}: {weight.name} is stored in {stored}, and config.json says "
                    f"{', '.join(map(str, schemes))}; loaders go by the config: correct it, or download the checkpoint "
                    "again"
                )


_MARKS = Marks(
    side_suffixes=(f".{SHAPE}", f".{ZEROS}", f".{GROUPS}"),
    owned=(MAIN, SCALES),
    methods=MappingProxyType({METHOD: _check_config}),
    described=_check_described,
)


INT4_WITH_ZEROS = grid_of(4, USUAL_GROUP_SIZE, zero_points_of(4))


# -- the format --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackQuantizedFormat(InGroups):
    """Integers of so many bits, in groups of the grid's block; with zero points where the grid has offsets."""

    name: str
    bits: int
    grid: TableGrid
    group_sizes: tuple[int, ...] = GROUP_SIZES
    loaders: str = "transformers with compressed-tensors, vLLM"
    library: str = METHOD
    family: str = METHOD
    has_partners: bool = True
    load_in: None = None
    skips_by_path: bool = True
    expert_loaders: tuple[str, ...] = ("transformers with compressed-tensors", "vLLM")
    config_copy: str | None = None
    marks: Marks = _MARKS

    @property
    def layout(self) -> str:
        zeros = "" if self.grid.offsets is None else ", with zero points"
        return f"compressed-tensors, {self.bits}-bit integers in groups of {self.group_size}{zeros}"

    @property
    def group_size(self) -> int:
        return self.grid.block

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (16 if self.grid.offsets is None else 16 + self.bits) / self.grid.block

    def of_group_size(self, size: int) -> PackQuantizedFormat:
        return replace(self, grid=self.grid.of_block(size))

    def fits(self, name: str, shape: Shape) -> bool:
        """Whole groups; and an even number of them, or 16-bit scales would end between two int32.

        A single row is a gate, which vLLM expects in 16 bit. Of zero points a word has those of several rows.
        """
        del name
        rows = 1 if self.grid.offsets is None else _WORD_BITS // self.bits
        return (
            len(shape) == 2
            and shape[0] % rows == 0
            and shape[0] > 1
            and math.prod(shape) > 0
            and shape[1] % self.grid.block == 0
            and math.prod(shape) // self.grid.block % 2 == 0
        )

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format. The symmetric one finds all of its bits."""
        if self.grid.offsets is not None:
            return ()
        settings = read_settings(quantization)
        modules = [name.removesuffix(f".{MAIN}") for name in free if name.endswith(f".{MAIN}")]
        with TensorReader() as reader:
            weights = find_each(
                modules,
                lambda module: _find_weight(f"{module}.{MAIN}", self.bits, settings, free, reader),
                free,
                STORAGE,
            )
        # A scale a row is a group of as many elements as there are columns; where all are, it is one format, unless the
        # config has groups of each of these sizes. Whether it agrees else is checked afterwards.
        sizes = {weights.get("group_size") for weights in weights_of(quantization)}
        has_rows = all(
            weight.shape[1] == weight.decoder.grid.block for weight in weights if weight.decoder.grid
        )
        widths = {weight.shape[1] for weight in weights}
        if has_rows and len(widths) > 1 and not widths <= sizes:
            return [_in_rows(weight) for weight in weights]
        return weights

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> PackQuantizedEncoder:
        """See Format."""
        if not self.fits(name, shape) or not name.endswith(".weight"):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}; {self.name} stores matrices of modules only, rows in groups of "
                f"{self.grid.block}{self._whole_words()}: exclude it with --ignore"
            )
        if dtype.name not in DENSE:
            raise UnsupportedError(
                f"{name} is {dtype}; {self.name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
            )
        stored_as = grouped_name(self.name, self.grid.block)
        return PackQuantizedEncoder(stored_as, name, shape, dtype, self.bits, self.grid)

    def _whole_words(self) -> str:
        return "" if self.grid.offsets is None else f" and a multiple of {_WORD_BITS // self.bits} rows"

    def module_config(self) -> Json:
        """See Mixable."""
        return {
            "format": STORAGE,
            "input_activations": None,
            "output_activations": None,
            "weights": arguments(
                "int",
                self.bits,
                "group",
                group_size=self.grid.block,
                symmetric=self.grid.offsets is None,
            ),
        }
