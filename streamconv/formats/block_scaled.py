"""Reading of weights whose scales are each of a block of rows and columns: FP8, NVFP4, MXFP4, MLX.

An element is what its code stands for, times the scale of its block, plus the block's offset where there is one; in
float32, rounded once to the type of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32, Dtype
from streamconv.errors import CheckpointError
from streamconv.formats.base import Order, wrong
from streamconv.kernels.grids import DecodedGrid

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit float of the OCP Microscaling specification (v1.0, table 5), by code."""


def _fp8(raw: Tensor, out: Tensor) -> None:
    out.copy_(raw.view(torch.float8_e4m3fn))


def _fp4(raw: Tensor, out: Tensor) -> None:
    table = torch.tensor(E2M1, device=raw.device)
    torch.index_select(table, 0, unpacked(raw, 4).to(torch.int32), out=out)


def _integers(bits: int) -> Callable[[Tensor, Tensor], None]:
    def write(raw: Tensor, out: Tensor) -> None:
        out.copy_(unpacked(raw, bits))

    return write


def unpacked(raw: Tensor, bits: int) -> Tensor:
    """Codes (uint8, flat) of bytes that hold 2, 4 or 8 bits each, the lowest first."""
    if bits == 8:
        return raw
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
    codes: Tensor = (raw[:, None] >> shifts) & (2**bits - 1)
    return codes.view(-1)


CODES: Mapping[str, tuple[int, Callable[[Tensor, Tensor], None]]] = MappingProxyType(
    {
        "e4m3": (8, _fp8),
        "e2m1": (4, _fp4),
        "u2": (2, _integers(2)),
        "u4": (4, _integers(4)),
        "u8": (8, _integers(8)),
    }
)
"""Bits of a code, and what writes the values (float32, flat) that bytes (uint8, flat) stand for."""


def _exponents(stored: Tensor) -> Tensor:
    """Powers of two by their biased exponents (E8M0); 255 is NaN."""
    return torch.exp2(stored.float() - 127).masked_fill(stored == 255, torch.nan)


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales in the files: `main` is the part that has one for each block, [rows of blocks, blocks of a row].

    `offsets` is a part of the same shape, added. `factor` multiplies all. `is_exponent`: bytes are biased exponents of
    two. `turned`: the part is [experts, blocks of a row, rows of blocks].
    """

    main: str
    offsets: str | None = None
    factor: float = 1.0
    is_exponent: bool = False
    turned: bool = False


@dataclass(frozen=True, slots=True)
class BlockScaledDecoder:
    """Decoder of rows of `columns` codes, named as in CODES; blocks are `block_rows` times `block_columns` elements."""

    name: str
    main: str
    columns: int
    coding: str
    block_rows: int
    block_columns: int
    stored: Scales
    dtype: Dtype
    order: Order | None = None

    @property
    def grid(self) -> DecodedGrid:
        """Grid of a block as wide as a row: then those of a cell follow each other."""
        return DecodedGrid(self.coding, self.block_rows * self.columns)

    def row_offset(self, row: int) -> int:
        return row * self.columns * CODES[self.coding][0] // 8

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """Scales as they are stored, [rows of blocks, blocks of a row]; with offsets, [..., ..., 2]."""
        found = side[self.stored.main]
        if self.stored.turned:
            found = found.permute(0, 2, 1).flatten(0, 1)
        found = found.reshape(-1, -(-self.columns // self.block_columns))
        if not self.stored.is_exponent and not bool(found.float().isfinite().all()):
            raise CheckpointError(
                f"{self.name}: a stored scale is NaN or infinite; the checkpoint is damaged, download it again"
            )
        if self.stored.offsets is None:
            return found
        return torch.stack((found, side[self.stored.offsets].reshape(found.shape)), dim=-1)

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        raise AssertionError(f"{self.name}: codes of {rows} mean something with their scales only")

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        CODES[self.coding][1](raw, out.view(-1))
        if self.stored.offsets is None:
            self._with_blocks(out, Tensor.mul_, self._of_rows(scales, rows))
        else:
            self._with_blocks(out, Tensor.mul_, self._of_rows(scales[..., 0], rows))
            self._with_blocks(out, Tensor.add_, self._of_rows(scales[..., 1], rows))
        return out if self.dtype == F32 else out.copy_(out.to(self.dtype.torch))

    def _of_rows(self, blocks: Tensor, rows: range) -> Tensor:
        """Factors or offsets [rows, blocks of a row], one row where all have the same, of blocks that hold `rows`."""
        found = _exponents(blocks) if self.stored.is_exponent else blocks.float()
        if self.stored.factor != 1:
            found = found * self.stored.factor
        if self.block_rows == 1 or found.shape[0] == 1:
            return found
        first = rows.start // self.block_rows
        numbers = torch.arange(rows.start, rows.stop, device=found.device) // self.block_rows - first
        return found.index_select(0, numbers)

    def _with_blocks(self, out: Tensor, apply: Callable[[Tensor, Tensor], Tensor], factors: Tensor) -> None:
        """Apply a factor or an offset to every element of its block, in place."""
        count = factors.shape[1]
        if count in (1, self.columns):
            apply(out, factors)
        elif count * self.block_columns == self.columns:
            apply(out.view(len(out), count, self.block_columns), factors[:, :, None])
        else:
            apply(out, factors.repeat_interleave(self.block_columns, 1)[:, : self.columns])


def check_tensor(tensor: StoredTensor, codes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raise CheckpointError unless a part has one of these types and shapes."""
    if tensor.dtype.code in codes and tensor.shape in shapes:
        return
    expected = " or ".join(str(list(shape)) for shape in shapes)
    raise wrong(tensor, f"{' or '.join(codes)} {expected}")
