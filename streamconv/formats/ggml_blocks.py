"""Weights as GGUF files have them, for reading: floats, and all of ggml's types of blocks.

Values are those that llama.cpp dequantizes to, in float32. What the file does not store is the type that a weight had
before: all of a model count as of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import DENSE, GGML_NUMBERS, Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Order, Weight, matrix_shape
from streamconv.formats.dense import MAIN, DenseDecoder, dense_weight
from streamconv.formats.gguf import RowOrder
from streamconv.kernels.ggml import BY_NUMBER, BlockType, block_kernels_for
from streamconv.kernels.ggml.iq_grids import IQ_TYPES, iq_grid
from streamconv.kernels.grids import DecodedGrid

OF_GGUF = " of GGUF"
"""After the name of a type of blocks; other files have MXFP4 and NVFP4 in other layouts."""


@dataclass(frozen=True, slots=True)
class GgmlDecoder:
    """Rows of blocks that have their scales between the codes."""

    kind: BlockType
    columns: int
    order: Order | None = None
    main: str = MAIN

    @property
    def grid(self) -> DecodedGrid:
        return DecodedGrid(self.kind.name, self.columns)

    def row_offset(self, row: int) -> int:
        return row * self.kind.row_bytes(self.columns)

    def scales(self, side: Mapping[str, Tensor]) -> Tensor | None:
        """None: they are in the main part."""
        del side
        return None

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        raise AssertionError(
            f"{self.kind.name}: codes of {rows} ({len(raw)} bytes) mean something in their blocks"
        )

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder."""
        del rows, scales
        kind = self.kind
        block_kernels_for(raw.device).decode(kind, raw.view(-1, kind.bytes), out.view(-1, kind.super_block))
        return out


@dataclass(frozen=True, slots=True)
class ShiftedDecoder(DenseDecoder):
    """Takes from every value, in float32, what was added to it."""

    shift: float = 0.0

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder."""
        del scales
        out.copy_(raw.view(self.dtype.torch).view(len(rows), self.columns))
        return out.sub_(self.shift)


def gguf_weight(tensor: StoredTensor, dtype: Dtype, heads: int | None, shift: float) -> Weight:
    """The weight of that `dtype` that `tensor` alone stores, under its name.

    Rows of `heads` heads are in llama.cpp's order, `shift` was added. Raises UnsupportedError for a type that is no
    float and no block, or whose table is not to be had.
    """
    rows, columns = tensor.shape[0], matrix_shape(tensor.shape)[1]
    order = None if heads is None else RowOrder(heads, rows, tensor.nbytes // rows)  # of a bias, its elements
    if tensor.dtype.block > 1:
        if tensor.dtype.code.lower() in IQ_TYPES:
            iq_grid(tensor.dtype.code.lower())  # missing, it is missed now, not at the first row
        name = tensor.dtype.code.lower() + OF_GGUF
        decoder = GgmlDecoder(BY_NUMBER[GGML_NUMBERS[tensor.dtype.code]], columns, order)
        return Weight(tensor.name, tensor.shape, dtype, name, decoder, {MAIN: tensor})
    if tensor.dtype.name not in DENSE:
        raise UnsupportedError(
            f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype}, expected a float type or one of blocks"
        )
    if order is None and not shift and dtype == tensor.dtype:
        return dense_weight(tensor.name, tensor)
    dense: DenseDecoder = DenseDecoder(tensor.dtype, columns, order=order)
    if shift:
        dense = ShiftedDecoder(tensor.dtype, columns, order=order, shift=shift)
    return Weight(
        tensor.name, tensor.shape, dtype, f"{tensor.dtype.name}, as GGUF has it", dense, {MAIN: tensor}
    )
