"""bitsandbytes 4-bit storage: packed codes, a scale for every 64 elements, a JSON state.

Source: bitsandbytes `functional.py` (QuantState, quantize_4bit, create_dynamic_map) and
`backends/default/ops.py`. A weight [out, in] is flattened row by row and cut into blocks of 64, straight
across row ends; the last block may be short. An element is `table[code] * absmax[block]` in float32,
then cast to the weight's own dtype. Byte i holds code 2i in its high half and code 2i + 1 in its low half.

    P                                    uint8 [⌈elements / 2⌉, 1]
    P.absmax                             float32 [blocks]; with double quantization uint8
    P.quant_map                          float32 [16], the table
    P.quant_state.bitsandbytes__nf4      uint8, JSON; of fp4, `__fp4`
    P.nested_absmax, P.nested_quant_map  float32 [⌈blocks / 256⌉] and [256], with double quantization only

Double quantization stores `absmax[i] = nested_quant_map[index[i]] * nested_absmax[i // 256] + nested_offset`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import BF16, DENSE, F16, F32, U8, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    Constant,
    Json,
    Marks,
    Order,
    Weight,
    any_config,
    matrix_shape,
    parts_of,
)
from streamconv.formats.nested_scales import DYNAMIC, NESTED_BLOCK, NestedScales, nest
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid

MAIN = "weight"
_BLOCKS = tuple(32 << shift for shift in range(8))
_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 65536
# Sign, 17 digits, point and exponent: the longest that Python writes a float32.
_LONGEST_FLOAT = 24
_OFFSET = "nested_offset"
_SIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MARKS = Marks(
    side_suffixes=(*(f".{part}" for part in _SIDE), f"{_STATE}nf4", f"{_STATE}fp4"),
    codes=MappingProxyType({U8: ("packed 4-bit codes", "quant_state")}),
    methods=MappingProxyType({"bitsandbytes": any_config}),
)


@dataclass(frozen=True, slots=True)
class Bnb4bitDecoder:
    """Decoder of a packed weight; `nested_offset` is None without double quantization."""

    name: str
    dtype: Dtype
    columns: int
    grid: TableGrid
    nested_offset: float | None
    main: str = MAIN
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return (row * self.columns + 1) // 2

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        if self.nested_offset is None:
            scales = side["absmax"]
        else:
            nested = NestedScales(
                side["absmax"], side["nested_absmax"], side["nested_quant_map"], self.nested_offset
            )
            scales = nested.effective()
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{self.name}: a stored scale is NaN or infinite; the checkpoint is damaged, download it again"
            )
        return scales

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        codes = torch.empty(len(rows) * self.columns, dtype=torch.uint8, device=raw.device)
        kernels_for(raw.device).unpack_pairs(raw, codes)
        return codes

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals dequantize_4bit bit for bit."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        kernels_for(raw.device).decode_pairs(raw, self.grid, scales, self.dtype, out.view(-1))
        return out


@dataclass(frozen=True, slots=True)
class _State:
    """The JSON of one weight, checked; `nested_offset` is None without double quantization."""

    block: int
    dtype: Dtype
    shape: Shape
    nested_offset: float | None


def _find_weight(
    name: str, grid: TableGrid, format_name: str, free: Mapping[str, StoredTensor], reader: TensorReader
) -> Weight:
    """The weight `name`, whose state is there; CheckpointError unless its parts are whole and agree."""
    parts = _gather(name, grid, free)
    state = _read_state(parts["quant_state"], grid.name, reader)
    _check_parts(name, parts, state)
    _check_table(parts["quant_map"], grid, reader)
    rows, columns = matrix_shape(state.shape)
    if rows > CELL_ROWS and CELL_ROWS * columns % state.block:
        raise UnsupportedError(
            f"{name}: blocks of {state.block} elements that run across rows of {columns} are not supported;"
            " give the 16-bit base model instead"
        )
    decoder = Bnb4bitDecoder(name, state.dtype, columns, grid.of_block(state.block), state.nested_offset)
    if state.block != grid.block:
        format_name = f"{format_name}, blocksize {state.block}"
    if parts[MAIN].dtype != U8:
        format_name = f"{format_name}, stored as {parts[MAIN].dtype.name}"
    return Weight(name, state.shape, state.dtype, format_name, decoder, parts)


def _gather(name: str, grid: TableGrid, free: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    roles = [MAIN, "absmax", "quant_map", "quant_state"]
    if _is_nested(name, free):
        roles += ["nested_absmax", "nested_quant_map"]
    return parts_of(name, {role: _part_name(name, role, grid) for role in roles}, free)


def _is_nested(name: str, free: Mapping[str, StoredTensor]) -> bool:
    return f"{name}.nested_absmax" in free or f"{name}.nested_quant_map" in free


def _part_name(name: str, role: str, grid: TableGrid) -> str:
    match role:
        case "weight":
            return name
        case "quant_state":
            return f"{name}{_STATE}{grid.name}"
        case _:
            return f"{name}.{role}"


def _read_state(tensor: StoredTensor, quant_type: str, reader: TensorReader) -> _State:
    if tensor.dtype != U8 or len(tensor.shape) != 1 or tensor.nbytes > _MAX_STATE_BYTES:
        raise _wrong(tensor, _described(tensor), f"U8 [n] of JSON, n at most {_MAX_STATE_BYTES}")
    where = f"{tensor.file.name}: tensor {tensor.name}"
    state = parse_object(reader.load(tensor).numpy().tobytes(), where)
    known = {"quant_type", "blocksize", "dtype", "shape"}
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    if set(state) not in (known, known | nested):
        expected = f"{sorted(known)}, all or none of {sorted(nested)}"
        raise _wrong(tensor, f"fields {shown(sorted(state))}", expected)
    shape, block, dtype = state["shape"], state["blocksize"], state["dtype"]
    if state["quant_type"] != quant_type:
        raise _wrong(tensor, f"quant_type {shown(state['quant_type'])}", quant_type)
    if not _is_int(block) or block not in _BLOCKS:
        raise _wrong(tensor, f"blocksize {shown(block)}", "a power of two from 32 to 4096")
    if dtype not in tuple(DENSE):
        raise _wrong(tensor, f"dtype {shown(dtype)}", ", ".join(DENSE))
    if not isinstance(shape, list) or not shape or not all(_is_int(size) and size > 0 for size in shape):
        raise _wrong(tensor, f"shape {shown(shape)}", "positive integers")
    offset = _read_nested_fields(tensor, state) if "nested_offset" in state else None
    return _State(block, DENSE[dtype], tuple(shape), offset)


def _read_nested_fields(tensor: StoredTensor, state: Json) -> float:
    offset = state["nested_offset"]
    is_number = isinstance(offset, float) or _is_int(offset)
    if not is_number or not abs(offset) <= torch.finfo(torch.float32).max:
        raise _wrong(tensor, f"nested_offset {shown(offset)}", "a finite float32")
    if state["nested_dtype"] != "float32":
        raise _wrong(tensor, f"nested_dtype {shown(state['nested_dtype'])}", "float32")
    if state["nested_blocksize"] != NESTED_BLOCK:
        raise UnsupportedError(
            f"{tensor.name}: nested_blocksize {shown(state['nested_blocksize'])} is not supported,"
            f" only {NESTED_BLOCK}; give the 16-bit base model instead"
        )
    return float(offset)


def _check_parts(name: str, parts: Mapping[str, StoredTensor], state: _State) -> None:
    """Every part has the type and size that the state's shape and block ask for."""
    elements = math.prod(state.shape)
    blocks = -(-elements // state.block)
    main, is_nested = parts[MAIN], "nested_absmax" in parts
    if is_nested != (state.nested_offset is not None):
        raise CheckpointError(
            f"{name}: its quant_state and its tensors disagree whether scales are double-quantized;"
            " nested_absmax, nested_quant_map and nested_offset must all be there, or none"
        )
    packed = (elements + 1) // 2
    is_column = main.shape[1:] in ((), (1,))
    if main.dtype not in (U8, BF16, F16, F32) or main.nbytes != packed or not is_column:
        raise _wrong(main, _described(main), f"U8 [{packed}, 1] for {list(state.shape)}")
    expected = {"absmax": (U8 if is_nested else F32, blocks), "quant_map": (F32, 16)}
    if is_nested:
        expected |= {"nested_absmax": (F32, -(-blocks // NESTED_BLOCK)), "nested_quant_map": (F32, 256)}
    for role, (dtype, count) in expected.items():
        tensor = parts[role]
        if tensor.dtype != dtype or tensor.shape != (count,):
            raise _wrong(tensor, _described(tensor), f"{dtype} [{count}]")


def _check_table(tensor: StoredTensor, grid: TableGrid, reader: TensorReader) -> None:
    """bitsandbytes' kernels have the table built in and ignore the one in the file: the two must agree."""
    table = torch.tensor(grid.values, dtype=torch.float32)
    if not torch.allclose(reader.load(tensor), table, rtol=0, atol=1e-6):
        raise _wrong(tensor, "another table", f"that of {grid.name}, which is the only one loaders apply")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _described(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _wrong(tensor: StoredTensor, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{tensor.file.name}: {tensor.name}: found {found}, expected {expected}")


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bnb4bitEncoder:
    """Encoder of a weight [out, in], with blocks of 64."""

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    grid: TableGrid
    nested: bool
    parts: tuple[TensorSpec, ...]
    constants: tuple[Constant, ...] = ()
    order: Order | None = None
    rounds_scales: bool = False
    cell_rows: int = CELL_ROWS

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    def row_offset(self, row: int) -> int:
        return (row * self.shape[1] + 1) // 2

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        if values.numel() % 2:
            zero = self.grid.nearest(torch.zeros(1, device=values.device))
            values = torch.cat((values, zero))
        kernels_for(values.device).pack_pairs(values, out)

    def effective_scales(self, scales: Tensor) -> Tensor:
        if not self.nested:
            return scales
        return nest(scales).effective()

    def nest(self, scales: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """See Nesting."""
        nested = nest(scales)
        side = {
            "absmax": nested.indices,
            "nested_absmax": nested.absmax,
            "nested_quant_map": nested.table,
            "quant_map": self.grid.tables(scales.device).values,
            _OFFSET: torch.tensor(nested.offset, dtype=torch.float32),
        }
        return side, nested.effective()

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is None:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            kept = self.nest(scales)[0] if self.nested else self._side(scales.cpu())
        side, offset = kept, self._offset(kept)
        tail = []
        for role, spec in zip(_roles(self.nested), self.parts, strict=True):
            if role != MAIN:
                content = self._state(spec.nbytes, offset) if role == "quant_state" else _bytes(side[role])
                assert len(content) == spec.nbytes, (
                    f"{spec.name}: {len(content)} bytes, planned {spec.nbytes}"
                )
                tail.append(content)
        return tuple(tail)

    def _side(self, scales: Tensor) -> Mapping[str, Tensor]:
        """The parts other than codes and state for `scales` that are not nested."""
        if not bool(scales.isfinite().all()):
            raise self._not_finite()
        return {"absmax": scales, "quant_map": torch.tensor(self.grid.values, dtype=torch.float32)}

    def _offset(self, kept: Mapping[str, Tensor]) -> float | None:
        """The nested offset of parts of the base, or of those that `nest` has made."""
        if not self.nested:
            return None
        if _OFFSET not in kept:
            state = parse_object(_bytes(kept["quant_state"]), f"{self.name}: quant_state")
            return float(state[_OFFSET])
        offset = float(kept[_OFFSET])
        if not math.isfinite(offset):  # a mean is finite if, and only if, all scales are
            raise self._not_finite()
        return offset

    def _not_finite(self) -> InputError:
        return InputError(f"{self.name} holds NaN or infinity, which {self.format} cannot store")

    def _state(self, length: int, offset: float | None) -> bytes:
        text = _state_text(self.grid, self.dtype, self.shape, offset)
        return text.encode().ljust(length)  # json.loads allows the spaces; the next part stays aligned


def _roles(nested: bool) -> tuple[str, ...]:
    """Parts in file order: bytes before floats, so that floats are aligned."""
    if nested:
        return (MAIN, "absmax", "quant_state", "nested_absmax", "nested_quant_map", "quant_map")
    return (MAIN, "quant_state", "absmax", "quant_map")


def _part_specs(
    name: str, shape: Shape, dtype: Dtype, grid: TableGrid, nested: bool
) -> tuple[TensorSpec, ...]:
    elements = math.prod(shape)
    packed, blocks = (elements + 1) // 2, -(-elements // grid.block)
    state = len(_state_text(grid, dtype, shape, 0.0 if nested else None)) + _LONGEST_FLOAT * nested
    state += -(packed + blocks * nested + state) % 8
    layout: Mapping[str, tuple[Dtype, Shape]] = {
        MAIN: (U8, (packed, 1)),
        "quant_state": (U8, (state,)),
        "absmax": (U8 if nested else F32, (blocks,)),
        "nested_absmax": (F32, (-(-blocks // NESTED_BLOCK),)),
        "nested_quant_map": (F32, (len(DYNAMIC.values),)),
        "quant_map": (F32, (len(grid.values),)),
    }
    return tuple(TensorSpec(_part_name(name, role, grid), *layout[role]) for role in _roles(nested))


def _state_text(grid: TableGrid, dtype: Dtype, shape: Shape, offset: float | None) -> str:
    """The JSON as QuantState.as_dict writes it: these fields, in this order, and no others."""
    state: Json = {
        "quant_type": grid.name,
        "blocksize": grid.block,
        "dtype": dtype.name,
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


# -- the format --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bnb4bitFormat:
    """One table of values, with or without double quantization."""

    name: str
    grid: TableGrid
    nested: bool = False
    loaders: str = "transformers with bitsandbytes, PEFT for training"
    library: str = "bitsandbytes"
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ()
    config_copy: str | None = None
    marks: Marks = _MARKS

    @property
    def bits_per_weight(self) -> float:
        scale = 8 + 32 / NESTED_BLOCK if self.nested else 32
        return 4 + scale / self.grid.block

    @property
    def layout(self) -> str:
        kind = "NormalFloat" if self.name.startswith("nf4") else "float"
        scales = "double-quantized" if self.nested else "float32"
        return f"bitsandbytes 4-bit {kind}, blocks of {self.grid.block} with {scales} scales"

    @property
    def load_in(self) -> Mapping[str, str | bool]:
        """See Format. Products of training are in bfloat16."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_type": self.grid.name,
            "bnb_4bit_use_double_quant": self.nested,
        }

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format."""
        del quantization  # each weight has a state of its own
        suffix = _STATE + self.grid.name
        names = (name.removesuffix(suffix) for name in free if name.endswith(suffix))
        with TensorReader() as reader:
            return [
                _find_weight(name, self.grid, self.name, free, reader)
                for name in names
                if _is_nested(name, free) == self.nested
            ]

    def fits(self, name: str, shape: Shape) -> bool:
        del name
        return len(shape) == 2

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Bnb4bitEncoder:
        """See Format."""
        if len(shape) != 2 or not math.prod(shape):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}; {self.name} stores matrices only: exclude it with --ignore"
            )
        if dtype.name not in DENSE:
            raise UnsupportedError(
                f"{name} is {dtype}; {self.name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
            )
        parts = _part_specs(name, shape, dtype, self.grid, self.nested)
        return Bnb4bitEncoder(self.name, name, shape, dtype, self.grid, self.nested, parts)

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """See Format. The keys that transformers 5.23 writes, all of them.

        `llm_int8_skip_modules` is never null: null would make a loader add modules of its own choice.
        """
        del quantized  # all that the list does not name
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": dtype.name,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.grid.name,
            "bnb_4bit_use_double_quant": self.nested,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(skipped),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }
