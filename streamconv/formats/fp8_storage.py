"""FP8 weights as they are stored, decoded and encoded: a byte an element (E4M3), scales of blocks of rows and columns.

An element is the float that its byte stands for, times the scale of its block, in float32, rounded once to the type of
the weight. The grid has a scale for each run of a row that lies in one block; a stored scale is that of many runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.dtypes import DTYPES, U8, Dtype
from streamconv.errors import CheckpointError, InputError
from streamconv.formats.base import CELL_ROWS, Constant, Decoder, Order, ScaleScope
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import E4M3, E4M3_UNIT, TableGrid

CODE, EXPONENT = DTYPES["F8_E4M3"], DTYPES["F8_E8M0"]
EXPONENTS = (EXPONENT, U8)
"""Types of scales that are powers of two, stored as the exponent plus 127 (E8M0); 255 is NaN."""
MAIN = "weight"
# Of E4M3: the greatest value, and half of its distance from the next one.
_GREATEST, _HALF_STEP = 448.0, 16.0


def grid_of_blocks(height: int, width: int) -> TableGrid:
    """Grid of a format whose blocks have so many rows and columns."""
    return dataclasses.replace(E4M3, name=f"e4m3 in blocks of {height} x {width}", block=width)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a matrix [rows, columns], each of `height` rows and `width` columns; those at the ends may be short.

    `is_one`: one scale is all there is, whatever the size of the matrix.
    """

    rows: int
    columns: int
    height: int
    width: int
    is_one: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks above each other, and beside each other."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    @property
    def run(self) -> int:
        """Elements of a row that lie in one block wherever a run of so many starts."""
        return self.columns if self.columns <= self.width else math.gcd(self.width, self.columns)

    @property
    def grid(self) -> TableGrid:
        """Grid of a weight. A block of several rows is part of its name: other blocks have other scales to keep."""
        if self.height == 1 or self.is_one:
            return E4M3.of_block(self.run)
        return grid_of_blocks(self.height, self.width).of_block(self.run)

    def spread(self, stored: Tensor) -> Tensor:
        """Effective scales of all runs, float32, flat, of the `stored` ones, float32."""
        return self._over_runs(stored.reshape(self.counts) * E4M3_UNIT, self.rows)

    def _over_runs(self, blocks: Tensor, rows: int) -> Tensor:
        if self.counts[1] > 1:
            starts = torch.arange(0, self.columns, self.run, device=blocks.device)
            blocks = blocks.index_select(1, starts // self.width)
        if self.height > 1:
            blocks = blocks.index_select(0, torch.arange(rows, device=blocks.device) // self.height)
        return blocks.reshape(-1)

    def gathered(self, scales: Tensor) -> Tensor:
        """Greatest magnitude of the effective `scales` in each block, [blocks above, beside], of whole rows of blocks.

        NaN where one is.
        """
        runs = scales.abs().view(-1, self.columns // self.run)
        each = max(1, self.width // self.run) if self.columns > self.width else 1
        beside, above = self.counts[1], -(-len(runs) // self.height)
        height = min(self.height, len(runs))
        padded = functional.pad(runs, (0, beside * each - runs.shape[1], 0, above * height - len(runs)))
        return padded.view(above, height, beside, each).amax((1, 3))

    def tied(self, stored: Tensor, scales: Tensor) -> Tensor:
        """`stored` scales, float32, spread over as many runs as there are `scales`."""
        return self._over_runs(stored * E4M3_UNIT, scales.numel() // (self.columns // self.run))


def read_scales(stored: Tensor) -> Tensor:
    """Scales as float32 of any type that files have them in."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).float()


def stored_scales(scales: Tensor, dtype: Dtype) -> Tensor:
    """Positive `scales` (float32) in a type of files; where that has powers of two, the next one that is not less."""
    if dtype not in EXPONENTS:
        return scales.to(dtype.torch)
    mantissa, exponent = torch.frexp(scales)
    biased = (exponent - (mantissa == 0.5).to(exponent.dtype) + 127).clamp_(0, 254)
    return biased.masked_fill_(~scales.isfinite(), 255).to(torch.uint8).view(dtype.torch)


@dataclass(frozen=True, slots=True)
class Fp8Decoder:
    """Decoder of bytes in row order; `scale` is the name of the tensor with the stored scales, `role` its part's."""

    name: str
    scale: str
    role: str
    blocks: Blocks
    dtype: Dtype
    main: str = MAIN
    order: Order | None = None

    @property
    def grid(self) -> TableGrid:
        return self.blocks.grid

    def row_offset(self, row: int) -> int:
        return row * self.blocks.columns

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        stored = read_scales(side[self.role])
        # In units of the grid, the greatest of float32 are infinite, too.
        for kind, is_bad in {
            "NaN or infinite": ~(stored * E4M3_UNIT).isfinite(),
            "negative": stored < 0,
        }.items():
            if bool(is_bad.any()):
                raise CheckpointError(
                    f"{self.scale}: a stored scale is {kind}; the checkpoint is damaged, download it again"
                )
        return self.blocks.spread(stored)

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        del rows
        return raw

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Bytes that stand for no number decode to NaN."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.blocks.columns)
        kernels_for(raw.device).decode(raw, self.grid, scales, self.dtype, out.view(-1))
        # Asking a device would mean to wait for it.
        if raw.device.type != "cpu" or _has_nan(raw):
            out.view(-1).masked_fill_(raw.bitwise_and(0x7F) == 0x7F, torch.nan)
        return out


def _has_nan(raw: Tensor) -> bool:
    """Whether a byte is 0x7F or 0xFF: the greatest there is, with a sign or without."""
    return bool(raw.numel()) and (int(raw.amax()) == 0xFF or int(raw.view(torch.int8).amax()) == 0x7F)


@dataclass(frozen=True, slots=True)
class Fp8Encoder:
    """Encoder of a weight [out, in]; `scale` is the tensor that its scales are stored in.

    Runs of one block are given one scale, that of the greatest magnitude, as it is stored. A block of zeros has 1.
    """

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    scale: TensorSpec
    role: str
    blocks: Blocks
    nested: bool = False
    rounds_scales: bool = True
    order: Order | None = None
    constants: tuple[Constant, ...] = ()

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    @property
    def grid(self) -> TableGrid:
        return self.blocks.grid

    @property
    def cell_rows(self) -> int:
        """See Encoder; a scale for all of a weight is no matter of cells."""
        return CELL_ROWS if self.blocks.is_one else math.lcm(CELL_ROWS, self.blocks.height)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return TensorSpec(self.name, CODE, self.shape), self.scale

    def row_offset(self, row: int) -> int:
        return row * self.blocks.columns

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        out.copy_(values)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        return self.blocks.tied(read_scales(self._stored(scales)), scales)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is not None:
            found = kept[self.role]
        else:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            found = self._stored(scales)
        if not bool(read_scales(found).isfinite().all()):
            raise InputError(
                f"{self.name} holds NaN or infinity, or values too large for a scale of {self.scale.dtype.name}, which "
                f"{self.format} cannot store"
            )
        return (found.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),)

    def _stored(self, scales: Tensor) -> Tensor:
        found = self.blocks.gathered(scales).div_(E4M3_UNIT)
        stored = stored_scales(found.masked_fill_(found == 0, 1.0), self.scale.dtype)
        # Of 16 bit, the least are 0.
        return stored if self.scale.dtype in EXPONENTS else stored.masked_fill_(stored == 0, 1.0)


@dataclass(frozen=True, slots=True)
class Fp8TensorEncoder(Fp8Encoder):
    """Encoder with one scale for all of a weight, that of its `greatest` magnitude; None until that is known."""

    greatest: float | None = None
    scope: ScaleScope = ScaleScope.WEIGHT

    @property
    def is_known(self) -> bool:
        return self.greatest is not None

    def knowing(self, greatest: float) -> Self:
        return dataclasses.replace(self, greatest=greatest)

    def following(self, decoder: Decoder) -> Self:
        """See Surveyed. Where the base's scale will do is known once the targets are: see `outgrows`."""
        del decoder
        return self

    def _stored(self, scales: Tensor) -> Tensor:
        assert self.greatest is not None, f"{self.name}: its greatest magnitude is not known"
        size = torch.full(self.scale.shape, self.greatest / _GREATEST, device=scales.device)
        return stored_scales(size.masked_fill_(size == 0, 1.0), self.scale.dtype)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder: the same for all, whatever they are."""
        return self.blocks.tied(read_scales(self._stored(scales)).reshape(1, 1), scales)

    def raised(self, greatest: float) -> Self:
        """See Surveyed. No partner shares it: it is made anew, see `outgrows`."""
        del greatest
        return self

    def outgrows(self, scales: Tensor) -> bool:
        """See Surveyed: farther than any value is from the next one of its binade.

        Cut to the greatest they would be worse off than with a scale anew.
        """
        if self.greatest is None or not scales.numel():
            return False
        return self.greatest * E4M3_UNIT > (_GREATEST + _HALF_STEP) * float(scales[0])
