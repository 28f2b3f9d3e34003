"""GGUF's block types: matrices whose super-blocks hold scales and codes together, one type or a mix of several.

A format is called as `llama-quantize` calls what it makes: gguf:q8_0, gguf:q4_k_m. Types of single tensors are those of
`ggml_mixes.py`; gguf:q4_k and gguf:q5_k, which that program has as other names of mixes, have all matrices in one type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.dtypes import F16, F32, GGML_TYPES, Dtype
from streamconv.errors import InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    Constant,
    Format,
    Order,
)
from streamconv.formats.ggml_mixes import MIXES, Mix, MixedModel, fitting_type, mixed_type
from streamconv.formats.gguf import PREFIX, InGgufFile
from streamconv.kernels.ggml import BLOCK_TYPES, BlockType
from streamconv.kernels.ggml.grids import grid_of, packed, stored
from streamconv.kernels.grids import TableGrid


@runtime_checkable
class Typed(Format, Protocol):
    """A Format that has types of its own for the tensors of a GGUF file."""

    def type_of(self, tensor: str, columns: int, model: MixedModel) -> str:
        """Name of the format of a matrix, from its name in the file and the length of its rows."""


@dataclass(frozen=True, slots=True)
class BlocksEncoder:
    """Encoder of a tensor [..., out, in] of whole super-blocks, which hold their scales: one part."""

    spec: TensorSpec
    kind: BlockType
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    order: Order | None = None
    constants: tuple[Constant, ...] = ()
    dequantized_dtype: Dtype = F32
    # Scales are of this type.
    dtype: Dtype = F16

    @property
    def format(self) -> str:
        return PREFIX + self.kind.name

    @property
    def grid(self) -> TableGrid:
        return grid_of(self.kind)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)

    def row_offset(self, row: int) -> int:
        return row * self.kind.row_bytes(self.spec.shape[-1])

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """See Encoder."""
        assert scales is not None, f"{self.spec.name} was given no scales, which lie between the codes"
        packed(self.kind, values, scales, out)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        return stored(self.kind, scales)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder; there are no other parts."""
        del kept
        if scales is not None and not math.isfinite(scales.sum().item()):
            raise InputError(
                f"{self.spec.name} holds NaN or infinity, or values too large for the 16-bit scales of "
                f"{self.format}; look for NaN or infinity in the base and for an adapter that diverged in training, or "
                "choose gguf:bf16"
            )
        return ()


@dataclass(frozen=True, slots=True)
class GgufBlocksFormat(InGgufFile):
    """Matrices in a block type, or as a `mix` has it, whose base that type is; all else in float32."""

    name: str
    kind: BlockType
    mix: Mix | None = None

    @property
    def layout(self) -> str:
        """See Format."""
        others = (
            ", more of what counts most" if self.mix is not None and self.mix.name != self.kind.name else ""
        )
        return f"a GGUF file, ggml's {self.kind.name.upper()}{others}; norms and biases in float32"

    @property
    def grid(self) -> TableGrid:
        return grid_of(self.kind)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the type that most matrices have."""
        return self.kind.bits

    def type_of(self, tensor: str, columns: int, model: MixedModel) -> str:
        """See Typed; rows too short get a type with shorter blocks, or gguf:f16."""
        if self.mix is None:
            return PREFIX + fitting_type(self.kind.name, columns)
        return PREFIX + mixed_type(self.mix, tensor, columns, model)

    def fits(self, name: str, shape: Shape) -> bool:
        """Whether rows are whole super-blocks of the type."""
        del name
        return len(shape) > 1 and min(shape) > 0 and shape[-1] % self.kind.super_block == 0

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> BlocksEncoder:
        """See Format."""
        del dtype  # the format is the type
        if not self.fits(name, shape):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}, and {self.kind.name} stores rows of whole blocks of "
                f"{self.kind.super_block}; choose --quant gguf:f16"
            )
        return BlocksEncoder(TensorSpec(name, GGML_TYPES[self.kind.number], shape), self.kind)


# Formats in which all matrices have one type, though a mix may have it for most.
_PURE = ("q4_k", "q5_k")
_NAMES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
_MIXED = ("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")


def _format(name: str) -> GgufBlocksFormat:
    mix = None if name in _PURE else MIXES[name]
    return GgufBlocksFormat(PREFIX + name, BLOCK_TYPES[mix.base if mix else name], mix)


BLOCK_FORMATS: Mapping[str, GgufBlocksFormat] = {each.name: each for each in map(_format, (*_NAMES, *_MIXED))}
