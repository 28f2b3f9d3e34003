"""GGUF: tensors as llama.cpp has them. The model's names, and where its rows go, are the `gguf` room's business.

Rows are stored as in any other file; of some tensors they stand in another order (`RowOrder`), and norms of Gemma have
1 added (`ShiftedEncoder`), because llama.cpp multiplies by what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import F32, Dtype
from streamconv.formats.base import NO_MARKS, Constant, Encoder, Json, Marks, Order, Weight
from streamconv.formats.dense import DenseEncoder
from streamconv.kernels.grids import Grid

PREFIX = "gguf:"
LOADERS = "llama.cpp, Ollama, LM Studio"


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Rows of each of `heads` heads, which transformers rotates in halves, as pairs that lie together.

    Row 2 i + j of a head in the file is row i + j · half of the row form.
    """

    heads: int
    rows: int
    row_bytes: int

    @property
    def lines(self) -> int:
        return self.rows

    @property
    def line_bytes(self) -> int:
        return self.row_bytes

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        rows = form.view(self.rows, self.row_bytes)
        torch.index_select(rows, 0, self._rows(lines), out=out.view(len(lines), self.row_bytes))

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        rows = form.view(self.rows, self.row_bytes)
        rows[self._rows(lines)] = raw.view(len(lines), self.row_bytes)

    def _rows(self, lines: range) -> Tensor:
        """Rows of the row form that stand in these lines of a file."""
        size = self.rows // self.heads
        numbers = torch.arange(lines.start, lines.stop)
        within = numbers % size
        return numbers - within + within // 2 + within % 2 * (size // 2)


@dataclass(frozen=True, slots=True)
class ReorderedEncoder:
    """Another encoder's bytes, their rows in another order in the file."""

    inner: Encoder
    order: Order

    @property
    def format(self) -> str:
        return f"{self.inner.format}, rows in another order"

    @property
    def dtype(self) -> Dtype:
        return self.inner.dtype

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.inner.dequantized_dtype

    @property
    def grid(self) -> Grid | None:
        return self.inner.grid

    @property
    def nested(self) -> bool:
        return self.inner.nested

    @property
    def rounds_scales(self) -> bool:
        return self.inner.rounds_scales

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return self.inner.parts

    @property
    def constants(self) -> tuple[Constant, ...]:
        return self.inner.constants

    def row_offset(self, row: int) -> int:
        return self.inner.row_offset(row)

    @property
    def cell_rows(self) -> int:
        return self.inner.cell_rows

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        self.inner.pack(values, scales, out)

    def effective_scales(self, scales: Tensor) -> Tensor:
        return self.inner.effective_scales(scales)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        return self.inner.finish(scales, kept)


def with_rows_of_heads(encoder: Encoder, heads: int) -> ReorderedEncoder:
    """The encoder with the rows of `heads` heads, or the elements of their bias, as llama.cpp rotates them."""
    main = encoder.parts[0]
    return ReorderedEncoder(encoder, RowOrder(heads, main.shape[0], main.nbytes // main.shape[0]))


@dataclass(frozen=True, slots=True)
class ShiftedEncoder(DenseEncoder):
    """Adds a number to every value, in float32, before it is rounded."""

    shift: float = 0.0

    @property
    def format(self) -> str:
        return f"{self.dtype.name}, {self.shift:g} added"

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """See Encoder."""
        del scales  # there are none
        out.view(self.dtype.torch).copy_((values + self.shift).reshape(-1))


@dataclass(frozen=True, slots=True)
class ColumnsEncoder(DenseEncoder):
    """Stores some of a weight's columns."""

    columns: range = range(0)

    @property
    def format(self) -> str:
        return f"{self.dtype.name}, some columns"

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """See Encoder."""
        del scales  # there are none
        chosen = values[:, self.columns.start :: self.columns.step]
        out.view(self.dtype.torch).view(len(values), -1).copy_(chosen)


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """Some columns of a matrix as rows; row form is all of it, [rows, width] of items with so many bytes."""

    rows: int
    width: int
    columns: range
    itemsize: int

    @property
    def lines(self) -> int:
        return len(self.columns)

    @property
    def line_bytes(self) -> int:
        return self.rows * self.itemsize

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        chosen = self.columns[lines.start : lines.stop]
        columns = form.view(self.rows, self.width, self.itemsize)[:, chosen.start : chosen.stop : chosen.step]
        out.view(len(lines), self.rows, self.itemsize).copy_(columns.transpose(0, 1))

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        chosen = self.columns[lines.start : lines.stop]
        columns = form.view(self.rows, self.width, self.itemsize)[:, chosen.start : chosen.stop : chosen.step]
        columns.copy_(raw.view(len(lines), self.rows, self.itemsize).transpose(0, 1))


@dataclass(frozen=True, slots=True)
class TurnedEncoder(DenseEncoder):
    """Stores a matrix [in, out], or some of its columns, as [out, in]; `width` are its columns."""

    width: int = 0

    @property
    def format(self) -> str:
        return f"{self.dtype.name}, turned"

    def row_offset(self, row: int) -> int:
        return row * self.width * self.dtype.itemsize


def turned_encoder(spec: TensorSpec, rows: int, width: int, columns: range) -> TurnedEncoder:
    """Encoder of `columns` of a matrix [rows, width] as rows of a tensor."""
    order = ColumnOrder(rows, width, columns, spec.dtype.itemsize)
    return TurnedEncoder(spec, order=order, width=width)


class InGgufFile:
    """Members of formats that GGUF files alone have: no config says of them, and no safetensors file holds them."""

    __slots__ = ()
    loaders: ClassVar[str] = LOADERS
    library: ClassVar[None] = None
    load_in: ClassVar[None] = None
    skips_by_path: ClassVar[bool] = False
    expert_loaders: ClassVar[tuple[str, ...]] = (LOADERS,)
    config_copy: ClassVar[None] = None
    marks: ClassVar[Marks] = NO_MARKS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Nothing."""
        del free, quantization
        return []

    def quantization_config(
        self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]
    ) -> Json | None:
        del dtype, quantized, skipped
        return None


@dataclass(frozen=True, slots=True)
class GgufFormat(InGgufFile):
    """Matrices in one float type, all else in float32."""

    dtype: Dtype
    layout: str = "a GGUF file, norms and biases in float32"
    grid: Grid | None = None

    @property
    def name(self) -> str:
        return PREFIX + self.dtype.code.lower()

    @property
    def type(self) -> str:
        """Name of the type in those of files."""
        return self.dtype.code

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.dtype.itemsize

    def fits(self, name: str, shape: Shape) -> bool:
        del name, shape
        return True

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> DenseEncoder:
        del dtype  # the format is the type
        return DenseEncoder(TensorSpec(name, self.dtype, shape))


def full_encoder(name: str, shape: Shape, shift: float) -> DenseEncoder:
    """Encoder of what is stored in float32 whatever the format, `shift` added."""
    spec = TensorSpec(name, F32, shape)
    return ShiftedEncoder(spec, shift=shift) if shift else DenseEncoder(spec)
