"""compressed-tensors' pack-quantized storage: integers of 4 or 8 bits, a scale for every group of a row.

Source: compressed-tensors `compressors/pack_quantized` and `quantization/utils/helpers.py`. For a module P with a
weight [out, in] and groups of g elements of a row:

    P.weight_packed  int32 [out, ⌈in * bits / 32⌉], code k of a row from bit k * bits on, the lowest bit first
    P.weight_scale   [out, in / g], or [out, 1] for whole rows, in the weight's own dtype
    P.weight_shape   int64 [2], out and in

A code stands for code - 2^(bits - 1), and an element is that times its scale, rounded once, to the scale's dtype.

Only symmetric storage is read: a zero point shifts the grid from group to group. How a file is stored, its tensors
tell; config.json is checked against them, because loaders go by it.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import DENSE, I32, I64, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    GROUP_SIZES,
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
    MIXED,
    InGroups,
    arguments,
    part_of,
    unread_in,
    weights_of,
)
from streamconv.formats.undecoded import find_each
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid

STORAGE = "pack-quantized"
MAIN = "weight_packed"
SCALES = "weight_scale"
SHAPE = "weight_shape"
_STORAGES = frozenset({STORAGE})
_WORD_BITS = 32
_BITS = (4, 8)
# What may stand beside the parts, and why such weights are not read.
_REFUSED = {
    "weight_zero_point": "its integers are asymmetric (weight_zero_point)",
    "weight_g_idx": "its groups are in the order of activations (weight_g_idx)",
}


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
        scales = side[SCALES].reshape(-1).float().mul(2 ** (self.bits - 1))
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
        if self.bits == 4 and raw.numel() * 2 == into.numel():
            kernels.decode_pairs(raw, self.grid, scales, self.dtype, into, low_first=True)
        else:
            kernels.decode(self.codes(raw, rows), self.grid, scales, self.dtype, into)
        return out


def _find_weight(
    packed: str, format_name: str, grid: TableGrid, free: Mapping[str, StoredTensor], reader: TensorReader
) -> Weight | None:
    """The weight whose main part is `packed`; None if its codes are not those of `grid`.

    Raises CheckpointError unless its parts are whole and agree, UnsupportedError where it is stored as is not read.
    """
    name = packed.removesuffix(MAIN) + "weight"
    for role, reason in _REFUSED.items():
        if _part_name(name, role) in free:
            raise UnsupportedError(
                f"{name}: {reason}, which is not read yet; give the 16-bit base model instead"
            )
    parts = parts_of(name, {role: _part_name(name, role) for role in (MAIN, SCALES, SHAPE)}, free)
    rows, columns = _read_shape(parts[SHAPE], reader)
    bits = _bits(parts[MAIN], rows, columns)
    if 2**bits != len(grid.values):
        return None
    scales = parts[SCALES]
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    is_whole = groups > 0 and columns % groups == 0
    if scales.dtype.name not in DENSE or scales.shape != (rows, groups) or not is_whole:
        raise wrong(scales, f"a float type and [{rows}, groups] for groups of the {columns} columns")
    decoder = PackQuantizedDecoder(name, scales.dtype, columns, bits, grid.of_block(columns // groups))
    kind = grouped_name(format_name, decoder.grid.block)
    return Weight(name, (rows, columns), scales.dtype, kind, decoder, parts)


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
    fitting = [bits for bits in _BITS if tensor.shape == (rows, _words(columns, bits))]
    if tensor.dtype != I32 or not fitting:
        expected = " or ".join(f"[{rows}, {_words(columns, bits)}]" for bits in _BITS)
        raise wrong(tensor, f"I32 {expected} for 4 or 8 bits of [{rows}, {columns}]")
    if len(fitting) > 1:
        raise UnsupportedError(
            f"{tensor.name}: rows of {columns} are too short to tell 4 bits from 8; give the 16-bit base model instead"
        )
    return fitting[0]


# -- the config --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scheme:
    """Storage of weights as a group of a config says it; `group_size` is None for a scale a row."""

    bits: int
    group_size: int | None


# Groups of a config may go by these names (`quantization/quant_scheme.py`), with a list of what they are for.
_PRESETS = {"W4A16": Scheme(4, 128), "W8A16": Scheme(8, 128)}


def read_schemes(config: Mapping[str, Any], where: str) -> frozenset[Scheme]:
    """Schemes of weights in the `quantization_config` of a checkpoint.

    Raises UnsupportedError, with what is asked for that is not read, CheckpointError where it is not a config.
    """
    found = config.get("format")
    if found != STORAGE:
        unread = (
            f" with {', '.join(sorted(unread_in(config)))}" if found == MIXED and unread_in(config) else ""
        )
        raise _unread(where, f"its format is {shown(found)}{unread}")
    for key, what in {
        "kv_cache_scheme": "its KV cache is quantized",
        "transform_config": "its weights are rotated (transform_config)",
    }.items():
        if config.get(key):
            raise _unread(where, what)
    sparsity = config.get("sparsity_config")
    if sparsity and sparsity.get("format") != "dense":
        raise _unread(where, "its weights are sparse (sparsity_config)")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config_groups is missing from quantization_config, or empty")
    return frozenset(_scheme(name, group, where) for name, group in groups.items())


def _scheme(name: str, group: object, where: str) -> Scheme:
    if isinstance(group, list) and name in _PRESETS:
        return _PRESETS[name]
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise _unread(where, f"{name} is {shown(group)}")
    if group.get("format") not in (None, STORAGE):
        raise _unread(where, f"{name} has the format {shown(group['format'])}")
    if group.get("input_activations") or group.get("output_activations"):
        raise _unread(where, f"{name} quantizes activations")
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    if kind != "int" or bits not in _BITS:
        raise _unread(where, f"{name} has weights of {shown(bits)} bits, type {shown(kind)}")
    if weights.get("symmetric", True) is not True:
        raise _unread(where, f"{name} has asymmetric weights")
    if strategy not in ("group", "channel") or (strategy == "group" and not isinstance(size, int)):
        raise _unread(where, f"{name} has the strategy {shown(strategy)} with group_size {shown(size)}")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise _unread(where, f"{name} has groups in the order of activations (actorder)")
    return Scheme(bits, size if strategy == "group" else None)


def check_described(weights: Iterable[Weight], schemes: frozenset[Scheme], where: str) -> None:
    """Raise CheckpointError for a weight that is stored as config.json says of none."""
    for weight in weights:
        decoder = weight.decoder
        if isinstance(decoder, PackQuantizedDecoder):
            block = decoder.grid.block
            is_row = block == decoder.columns  # one group, or a scale a row: the same tensors
            if Scheme(decoder.bits, block) not in schemes and not (
                is_row and Scheme(decoder.bits, None) in schemes
            ):
                known = ", ".join(
                    f"{scheme.bits} bits, groups of {scheme.group_size or 'a row'}" for scheme in schemes
                )
                raise CheckpointError(
                    f"{where}: {weight.name} is stored in {decoder.bits} bits, groups of {block}, and config.json says "
                    f"{known}; loaders go by the config: correct it, or download the checkpoint again"
                )


def _unread(where: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where} {METHOD}, and {reason}, which is not read yet; give the 16-bit base model instead"
    )


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackQuantizedEncoder:
    """Encoder of a weight [out, in] of whole groups, with scales of its own `dtype`."""

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    bits: int
    grid: TableGrid
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
        return (
            TensorSpec(_part_name(self.name, MAIN), I32, (rows, _words(columns, self.bits))),
            TensorSpec(_part_name(self.name, SCALES), self.dtype, (rows, columns // self.grid.block)),
        )

    @property
    def constants(self) -> tuple[Constant, ...]:
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
        return self._stored(scales).float().mul(2 ** (self.bits - 1))

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is not None:
            found = kept[SCALES]
        else:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            found = self._stored(scales)
        if not bool(found.isfinite().all()):
            raise InputError(
                f"{self.name} holds NaN or infinity, or values too large for a scale of {self.dtype.name}, which "
                f"{self.format} cannot store"
            )
        return (found.cpu().contiguous().view(torch.uint8).numpy().tobytes(),)

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.div(2 ** (self.bits - 1)).to(self.dtype.torch)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    read_schemes(part_of(config, _STORAGES), config_says(where))


def _check_described(weights: Iterable[Weight], config: Mapping[str, Any], where: str) -> None:
    check_described(weights, read_schemes(part_of(config, _STORAGES), where), where)


_MARKS = Marks(
    side_suffixes=(f".{SHAPE}", ".weight_zero_point", ".weight_g_idx"),
    owned=(MAIN, SCALES),
    methods=MappingProxyType({METHOD: _check_config}),
    described=_check_described,
)


# -- the format --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackQuantizedFormat(InGroups):
    """Integers of so many bits, in groups of the grid's block."""

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
        return f"compressed-tensors, {self.bits}-bit integers in groups of {self.group_size}"

    @property
    def group_size(self) -> int:
        return self.grid.block

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 16 / self.grid.block

    def of_group_size(self, size: int) -> PackQuantizedFormat:
        return dataclasses.replace(self, grid=self.grid.of_block(size))

    def fits(self, name: str, shape: Shape) -> bool:
        """Whole groups; and an even number of them, or 16-bit scales would end between two int32.

        A single row is a gate, which vLLM expects in 16 bit.
        """
        del name
        return (
            len(shape) == 2
            and shape[0] > 1
            and math.prod(shape) > 0
            and shape[1] % self.grid.block == 0
            and math.prod(shape) // self.grid.block % 2 == 0
        )

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format."""
        modules = [name.removesuffix(f".{MAIN}") for name in free if name.endswith(f".{MAIN}")]
        with TensorReader() as reader:
            weights = find_each(
                modules,
                lambda module: _find_weight(f"{module}.{MAIN}", self.name, self.grid, free, reader),
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
            return [dataclasses.replace(weight, format=f"{self.name}, a scale a row") for weight in weights]
        return weights

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> PackQuantizedEncoder:
        """See Format."""
        if not self.fits(name, shape) or not name.endswith(".weight"):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}; {self.name} stores matrices of modules only, rows in groups of "
                f"{self.grid.block}: exclude it with --ignore"
            )
        if dtype.name not in DENSE:
            raise UnsupportedError(
                f"{name} is {dtype}; {self.name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
            )
        stored_as = grouped_name(self.name, self.grid.block)
        return PackQuantizedEncoder(stored_as, name, shape, dtype, self.bits, self.grid)

    def module_config(self) -> Json:
        """See Mixable."""
        return {
            "format": STORAGE,
            "input_activations": None,
            "output_activations": None,
            "weights": arguments("int", self.bits, "group", group_size=self.grid.block),
        }
