"""Dense storage: one tensor a weight, one float an element. Also what can only be copied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import DENSE, F16, Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats.base import CELL_ROWS, NO_MARKS, Constant, Json, Marks, Order, Weight, matrix_shape
from streamconv.kernels.grids import Grid

MAIN = "weight"


@dataclass(frozen=True, slots=True)
class DenseDecoder:
    """Elements in row-major order."""

    dtype: Dtype
    columns: int
    main: str = MAIN
    grid: Grid | None = None
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return row * self.columns * self.dtype.itemsize

    def scales(self, side: Mapping[str, Tensor]) -> Tensor | None:
        del side
        return None

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        raise AssertionError(f"dense storage has no codes (asked for {len(raw)} bytes of rows {rows})")

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        del scales
        return out.copy_(raw.view(self.dtype.torch).view(len(rows), self.columns))


@dataclass(frozen=True, slots=True)
class VerbatimDecoder:
    """A tensor that is copied byte for byte: not a float, or one that float32 cannot hold."""

    name: str
    dtype: Dtype
    columns: int
    main: str = MAIN
    grid: Grid | None = None
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return self.dtype.nbytes((row, self.columns))

    def scales(self, side: Mapping[str, Tensor]) -> Tensor | None:
        del side
        return None

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        raise self._refusal(raw, rows)

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        del scales, out
        raise self._refusal(raw, rows)

    def _refusal(self, raw: Tensor, rows: range) -> UnsupportedError:
        del raw, rows
        kinds = ", ".join(str(dtype) for dtype in DENSE.values())
        return UnsupportedError(
            f"{self.name} is {self.dtype} and can only be copied; a weight that changes must be {kinds}"
        )


@dataclass(frozen=True, slots=True)
class DenseEncoder:
    """Rounds float32 to `dtype`, nearest, ties to even."""

    spec: TensorSpec
    nested: bool = False
    rounds_scales: bool = False
    cell_rows: int = CELL_ROWS
    grid: Grid | None = None
    constants: tuple[Constant, ...] = ()
    order: Order | None = None

    @property
    def format(self) -> str:
        return self.dtype.name

    @property
    def dtype(self) -> Dtype:
        return self.spec.dtype

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)

    def row_offset(self, row: int) -> int:
        return row * matrix_shape(self.spec.shape)[1] * self.dtype.itemsize

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """See Encoder."""
        del scales  # there are none
        out.view(self.dtype.torch).copy_(values.reshape(-1))

    def effective_scales(self, scales: Tensor) -> Tensor:
        return scales

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        del scales, kept
        return ()


@dataclass(frozen=True, slots=True)
class DenseFormat:
    """One float type."""

    dtype: Dtype
    layout: str = "one tensor a weight"
    loaders: str = "any"
    grid: Grid | None = None
    library: str | None = None
    load_in: None = None
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ()
    config_copy: str | None = None
    marks: Marks = NO_MARKS

    @property
    def name(self) -> str:
        return self.dtype.name

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.dtype.itemsize

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Every tensor of this type: a dense weight has no other mark."""
        del quantization
        return [dense_weight(name, tensor) for name, tensor in free.items() if tensor.dtype == self.dtype]

    def fits(self, name: str, shape: Shape) -> bool:
        del name, shape
        return True

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> DenseEncoder:
        del dtype  # the format is the type
        return DenseEncoder(TensorSpec(name, self.dtype, shape))

    def quantization_config(
        self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]
    ) -> Json | None:
        del dtype, quantized, skipped
        return None


def largest_dtype(
    tensors: Mapping[str, StoredTensor], but: str | tuple[str, ...], otherwise: Dtype = F16
) -> Dtype:
    """The type of the largest dense tensor whose name does not end in `but`; `otherwise` where there is none.

    It stands for that of weights beside, where a file does not tell what they were before they were quantized.
    """
    dense = [
        tensor for name, tensor in tensors.items() if tensor.dtype.name in DENSE and not name.endswith(but)
    ]
    return max(dense, key=lambda tensor: math.prod(tensor.shape)).dtype if dense else otherwise


def dense_weight(name: str, tensor: StoredTensor) -> Weight:
    """The weight `name` that `tensor` alone stores; of a type that is not in DENSE, it can only be copied."""
    columns = matrix_shape(tensor.shape)[1]
    parts = {MAIN: tensor}
    if tensor.dtype.name in DENSE:
        decoder = DenseDecoder(tensor.dtype, columns)
        return Weight(name, tensor.shape, tensor.dtype, tensor.dtype.name, decoder, parts)
    verbatim = VerbatimDecoder(name, tensor.dtype, columns)
    return Weight(name, tensor.shape, tensor.dtype, str(tensor.dtype), verbatim, parts)
