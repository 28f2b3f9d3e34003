"""The one table of element types: safetensors code, torch dtype, bytes per item.

Codes are those of the safetensors format (`safetensors/src/tensor.rs`, enum `Dtype`). Of types smaller than a byte (F4,
F6), a tensor is known by its bytes alone, and copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type of a stored tensor. `name` is how config.json spells it (`bfloat16`).

    `itemsize` bytes hold `block` elements of a row: 1, but for ggml's types, which have scales
    between the codes, and for those smaller than a byte.
    """

    code: str
    torch: torch.dtype
    itemsize: int
    block: int = 1

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor, whose rows are whole blocks."""
        return math.prod(shape) // self.block * self.itemsize

    @property
    def alignment(self) -> int:
        """Bytes of which a tensor's place in a file is a multiple, where loaders view its elements as they are."""
        return self.itemsize if self.block == 1 else 1

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
        code: Dtype(code, dtype, dtype.itemsize)
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

# Elements that are no whole bytes, in runs that are: their tensors are copied, and never looked into.
PACKED: Mapping[str, Dtype] = MappingProxyType(
    {
        "F4": Dtype("F4", torch.uint8, 1, block=2),
        "F6_E2M3": Dtype("F6_E2M3", torch.uint8, 3, block=4),
        "F6_E3M2": Dtype("F6_E3M2", torch.uint8, 3, block=4),
    }
)

U8, I8, I16, I32, U32, I64 = (DTYPES[code] for code in ("U8", "I8", "I16", "I32", "U32", "I64"))
F16, BF16, F32 = (DTYPES[code] for code in ("F16", "BF16", "F32"))

# ggml's types of blocks by number: name, bytes and elements of a block (`ggml.h`, enum ggml_type; `GGML_QUANT_SIZES` of
# gguf-py). Those that are only of activations, Q8_1 and Q8_K, are in no file.
_BLOCKS: Mapping[int, tuple[str, int, int]] = {
    2: ("Q4_0", 18, 32),
    3: ("Q4_1", 20, 32),
    6: ("Q5_0", 22, 32),
    7: ("Q5_1", 24, 32),
    8: ("Q8_0", 34, 32),
    10: ("Q2_K", 84, 256),
    11: ("Q3_K", 110, 256),
    12: ("Q4_K", 144, 256),
    13: ("Q5_K", 176, 256),
    14: ("Q6_K", 210, 256),
    16: ("IQ2_XXS", 66, 256),
    17: ("IQ2_XS", 74, 256),
    18: ("IQ3_XXS", 98, 256),
    19: ("IQ1_S", 50, 256),
    20: ("IQ4_NL", 18, 32),
    21: ("IQ3_S", 110, 256),
    22: ("IQ2_S", 82, 256),
    23: ("IQ4_XS", 136, 256),
    29: ("IQ1_M", 56, 256),
    34: ("TQ1_0", 54, 256),
    35: ("TQ2_0", 66, 256),
    39: ("MXFP4", 17, 32),
    40: ("NVFP4", 36, 64),
}
# Types of tensors in a GGUF file, by number.
GGML_TYPES: Mapping[int, Dtype] = MappingProxyType(
    {
        number: DTYPES[code]
        for number, code in {
            0: "F32",
            1: "F16",
            24: "I8",
            25: "I16",
            26: "I32",
            27: "I64",
            28: "F64",
            30: "BF16",
        }.items()
    }
    | {number: Dtype(code, torch.uint8, size, block) for number, (code, size, block) in _BLOCKS.items()}
)
GGML_NUMBERS: Mapping[str, int] = MappingProxyType({dtype.code: each for each, dtype in GGML_TYPES.items()})

# What a dense weight may be: the types a LoRA merge reads, adds to and rounds to.
DENSE: Mapping[str, Dtype] = MappingProxyType({dtype.name: dtype for dtype in (F32, F16, BF16)})
# What a tensor of indices may be; they are read as float32, which holds whole numbers up to 2**24.
WHOLE: Mapping[str, Dtype] = MappingProxyType({dtype.name: dtype for dtype in (U8, I16, I32, I64)})
