"""WeightDifference of one parameter between two checkpoints, read in tiles, whatever format either is stored in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.formats.base import CELL_ROWS, Weight, matrix_shape
from streamconv.formats.rows import StoredRows
from streamconv.running.opened import load_side


class DecodedRows:
    """Rows of a weight as a loader would see them, float32."""

    def __init__(self, reader: TensorReader, weight: Weight, on: torch.device) -> None:
        self._decoder, self._on = weight.decoder, on
        self._columns = matrix_shape(weight.shape)[1]
        self._stored = StoredRows(reader, weight)
        self._scales = weight.decoder.scales(load_side(reader, weight, on))

    def read(self, rows: range) -> Tensor:
        """Rows from a multiple of CELL_ROWS on, [len(rows), columns]."""
        raw = torch.empty(self._stored.nbytes(rows), dtype=torch.uint8)
        self._stored.read_into(rows, raw)
        out = torch.empty(len(rows), self._columns, device=self._on)
        return self._decoder.decode(raw.to(self._on), rows, self._scales_of(rows), out)

    def _scales_of(self, rows: range) -> Tensor | None:
        grid = self._decoder.grid
        if self._scales is None or grid is None:
            return self._scales
        first, last = (row * self._columns for row in (rows.start, rows.stop))
        return self._scales[first // grid.block : -(-last // grid.block)]


class WeightDifference:
    """`after` minus `before`, two weights of one shape, as a matrix of rows.

    It is held in memory, float32, where that takes no more than `budget` bytes; else it is read anew for each pass, in
    tiles of which as many bytes are in memory at once.
    """

    def __init__(
        self, reader: TensorReader, before: Weight, after: Weight, budget: int, on: torch.device
    ) -> None:
        self.rows, self.columns = matrix_shape(after.shape)
        self._before, self._after = (DecodedRows(reader, weight, on) for weight in (before, after))
        # Stored bytes, both sides and their difference: four tiles of float32 at most.
        fitting = budget // (16 * self.columns)
        self._height = max(CELL_ROWS, fitting - fitting % CELL_ROWS)
        self._whole: Tensor | None = None
        self._is_held = 4 * self.rows * self.columns <= budget

    def tiles(self, rows: range | None = None) -> Iterator[tuple[range, Tensor]]:
        """Rows `rows`, all of them by default, numbered from the first of these; a tile belongs to the reader."""
        rows = range(self.rows) if rows is None else rows
        for first in range(rows.start - rows.start % CELL_ROWS, rows.stop, self._height):
            tile = range(first, min(first + self._height, self.rows))
            wanted = range(max(tile.start, rows.start), min(tile.stop, rows.stop))
            found = self._read(tile)[wanted.start - tile.start : wanted.stop - tile.start]
            yield range(wanted.start - rows.start, wanted.stop - rows.start), found

    def hold(self) -> Self:
        """Read it once for all passes, where it may be held."""
        if self._is_held and self._whole is None:
            tiles = [
                self._read(range(first, min(first + self._height, self.rows))) for first in self._firsts()
            ]
            self._whole = torch.cat(tiles)
        return self

    def _firsts(self) -> range:
        return range(0, self.rows, self._height)

    def _read(self, rows: range) -> Tensor:
        if self._whole is not None:
            return self._whole[rows.start : rows.stop]
        return self._after.read(rows).sub_(self._before.read(rows))
