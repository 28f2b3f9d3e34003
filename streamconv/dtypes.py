"""The one table of element types: safetensors code, torch dtype, bits per item.

Codes are those of the safetensors format (`safetensors/src/tensor.rs`, enum `Dtype`). Of types smaller than a byte (F4,
F6), as of others for which torch has none, a tensor is known by its bytes alone, and copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type of a stored tensor. `name` is how config.json spells it (`bfloat16`).

    `bits` of an element; where they are no whole bytes, `itemsize` is 1, and `torch` is that of the bytes.
    """

    code: str
    torch: torch.dtype
    itemsize: int
    bits: int

    def nbytes(self, elements: int) -> int:
        """Bytes of so many elements, the last one filled up."""
        return -(-elements * self.bits // 8)

    @property
    def name(self) -> str:
        return str(self.torch).removeprefix("torch.")

    @property
    def is_float(self) -> bool:
        return self.torch.is_floating_point

    def __str__(self) -> str:
        return self.code


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        code: Dtype(code, dtype, dtype.itemsize, 8 * dtype.itemsize)
        for code, dtype in {
            "BOOL": torch.bool,
            "U8": torch.uint8,
            "I8": torch.int8,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
            "F8_E8M0": torch.float8_e8m0fnu,
            "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
            "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
            "U16": torch.uint16,
            "I16": torch.int16,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "U32": torch.uint32,
            "I32": torch.int32,
            "F32": torch.float32,
            "U64": torch.uint64,
            "I64": torch.int64,
            "F64": torch.float64,
            "C64": torch.complex64,
        }.items()
    }
)
# Elements that are no whole bytes: their tensors are copied, and never looked into.
PACKED: Mapping[str, Dtype] = MappingProxyType(
    {code: Dtype(code, torch.uint8, 1, bits) for code, bits in {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}.items()}
)

U8, I8, I16, I32, U32, I64 = (DTYPES[code] for code in ("U8", "I8", "I16", "I32", "U32", "I64"))
F16, BF16, F32 = (DTYPES[code] for code in ("F16", "BF16", "F32"))

# What a dense weight may be: the types a LoRA merge reads, adds to and rounds to.
DENSE: Mapping[str, Dtype] = MappingProxyType({dtype.name: dtype for dtype in (F32, F16, BF16)})
# What a tensor of indices may be; they are read as float32, which holds whole numbers up to 2**24.
WHOLE: Mapping[str, Dtype] = MappingProxyType({dtype.name: dtype for dtype in (U8, I16, I32, I64)})
