"""bitsandbytes LLM.int8 storage: a byte an element, a scale for every row.

Source: bitsandbytes `nn/modules.py` (Int8Params, Linear8bitLt) and `backends/default/ops.py`
(int8_vectorwise_quant, int8_vectorwise_dequant). For a module P with a weight [out, in]:

    P.weight         int8 [out, in], round(w * 127 / SCB[row])
    P.SCB            float32 [out], the row's greatest magnitude
    P.weight_format  uint8 [], 0: row by row

An element is `weight * SCB[row] / 127` in float32; bitsandbytes keeps it so. The type that the weight had before it
was quantized is stored nowhere: that of the largest dense tensor, the embedding as a rule, stands for it.

bitsandbytes casts a weight to float16 before it quantizes it; here it stays float32. A bfloat16 weight gets the same
codes either way, but for rows beyond 65504, which bitsandbytes stores as infinite, and those of magnitudes under
0.002 or so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import DENSE, F32, I8, U8, Dtype
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
    wrong,
)
from streamconv.formats.dense import largest_dtype
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import INT8, IntegerGrid

MAIN = "weight"
SCALES = "SCB"
LAYOUT = "weight_format"
_MARKS = Marks(
    side_suffixes=(f".{SCALES}", f".{LAYOUT}"),
    codes=MappingProxyType({I8: ("8-bit codes", SCALES)}),
    methods=MappingProxyType({"bitsandbytes": any_config}),
)
_ROW_BY_ROW = bytes([0])
# Only to say what a scale a row amounts to.
_USUAL_COLUMNS = 4096


def _part_name(weight: str, role: str) -> str:
    """`P.SCB` of `P.weight`: parts stand beside the weight, not below it."""
    return weight.removesuffix(MAIN) + role


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Int8Decoder:
    """Elements in row-major order, as two's complement."""

    name: str
    grid: IntegerGrid
    main: str = MAIN
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return row * self.grid.block

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        scales = side[SCALES]
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{_part_name(self.name, SCALES)}: a stored scale is NaN or infinite: the weight was too large for"
                " float16 when it was quantized, or the file is damaged; give the 16-bit base model instead"
            )
        return scales

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        del rows
        return raw

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals int8_vectorwise_dequant bit for bit."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.grid.block)
        kernels_for(raw.device).decode(raw, self.grid, scales, F32, out.view(-1))
        return out


def _find_weight(
    name: str, format_name: str, dtype: Dtype, free: Mapping[str, StoredTensor], reader: TensorReader
) -> Weight:
    """The weight `name`, whose scales are there; CheckpointError unless its parts are whole and agree."""
    if name not in free:
        raise CheckpointError(
            f"{name} is missing, to which {_part_name(name, SCALES)} belongs;"
            " the checkpoint is incomplete, download it again"
        )
    main = free[name]
    if main.dtype != I8 or len(main.shape) != 2 or not math.prod(main.shape):
        raise wrong(main, "I8 [out, in], to go with its SCB")
    rows, columns = main.shape
    parts = {MAIN: main, SCALES: free[_part_name(name, SCALES)]}
    if parts[SCALES].dtype != F32 or parts[SCALES].shape != (rows,):
        raise wrong(parts[SCALES], f"F32 [{rows}]")
    layout = free.get(_part_name(name, LAYOUT))
    if layout is not None:  # older files have none
        _check_layout(layout, reader)
        parts[LAYOUT] = layout
    return Weight(name, main.shape, dtype, format_name, Int8Decoder(name, INT8.of_width(columns)), parts)


def _check_layout(tensor: StoredTensor, reader: TensorReader) -> None:
    if tensor.dtype != U8 or tensor.nbytes != 1:
        raise wrong(tensor, "U8, one element")
    if reader.load(tensor).numpy().tobytes() != _ROW_BY_ROW:
        raise UnsupportedError(
            f"{tensor.name}: the weight is stored in the order of some GPU, which current bitsandbytes does not"
            " read either; give the 16-bit base model instead"
        )


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Int8Encoder:
    """Encoder of a weight [out, in]; `dtype` is what a 16-bit copy of it would have."""

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    grid: IntegerGrid
    nested: bool = False
    rounds_scales: bool = False
    cell_rows: int = CELL_ROWS
    dequantized_dtype: Dtype = F32
    order: Order | None = None

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec(self.name, I8, self.shape),
            TensorSpec(_part_name(self.name, SCALES), F32, self.shape[:1]),
        )

    @property
    def constants(self) -> tuple[Constant, ...]:
        return (Constant(TensorSpec(_part_name(self.name, LAYOUT), U8, ()), _ROW_BY_ROW),)

    def row_offset(self, row: int) -> int:
        return row * self.grid.block

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        out.copy_(values)

    def effective_scales(self, scales: Tensor) -> Tensor:
        return scales

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        found = scales if kept is None else kept[SCALES]
        assert found is not None, f"{self.name} was given neither scales nor kept parts"
        if not bool(found.isfinite().all()):
            raise InputError(f"{self.name} holds NaN or infinity, which {self.format} cannot store")
        return (found.cpu().contiguous().numpy().tobytes(),)


# -- the format --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Int8Format:
    """LLM.int8."""

    name: str
    grid: IntegerGrid = INT8
    layout: str = "bitsandbytes LLM.int8, a float32 scale a row"
    loaders: str = "transformers with bitsandbytes, PEFT for training"
    library: str = "bitsandbytes"
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ()
    config_copy: str | None = None
    marks: Marks = _MARKS

    @property
    def bits_per_weight(self) -> float:
        return 8 + 32 / _USUAL_COLUMNS

    @property
    def load_in(self) -> Mapping[str, str | bool]:
        """See Format."""
        return {"load_in_8bit": True}

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format."""
        del quantization  # tensors tell all of it
        suffix = f".{SCALES}"
        names = [name.removesuffix(SCALES) + MAIN for name in free if name.endswith(suffix)]
        if not names:
            return ()
        dtype = largest_dtype(free, but=suffix)
        with TensorReader() as reader:
            return [_find_weight(name, self.name, dtype, free, reader) for name in names]

    def fits(self, name: str, shape: Shape) -> bool:
        del name
        return len(shape) == 2

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Int8Encoder:
        """See Format."""
        if len(shape) != 2 or not math.prod(shape) or not name.endswith(f".{MAIN}"):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}; {self.name} stores matrices of modules only:"
                " exclude it with --ignore"
            )
        if dtype.name not in DENSE:
            raise UnsupportedError(
                f"{name} is {dtype}; {self.name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
            )
        return Int8Encoder(self.name, name, shape, dtype, self.grid.of_width(matrix_shape(shape)[1]))

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """The keys that transformers 5.23 writes, all of them; those of 4 bit have their defaults."""
        del (
            dtype,
            quantized,
        )  # activations are multiplied in int8; quantized is all that the list does not name
        return {
            "_load_in_4bit": False,
            "_load_in_8bit": True,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(skipped),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": False,
            "load_in_8bit": True,
            "quant_method": "bitsandbytes",
        }
