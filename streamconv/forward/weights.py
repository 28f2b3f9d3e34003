"""Weights of a plan, handed to a model instead of written to a file: decoded and updated by the code that merges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import Shape
from streamconv.formats.base import CELL_ROWS, matrix_shape
from streamconv.formats.rows import StoredRows
from streamconv.planning.devices import Device
from streamconv.planning.plan import Access, Copy, Plan, Rewrite, cell_rows, tile_rows
from streamconv.progress import OnBytes
from streamconv.running.direct import DirectEngine
from streamconv.running.opened import OpenedWeight, open_weight, read_tiles
from streamconv.running.workers import Workers

BUFFER_BYTES = 8 * 2**20
HOST_BYTES = 4 * BUFFER_BYTES
"""Bytes of host memory that weights for a GPU take on their way there: a tile, what it is read from, and side parts."""


class Weights(Protocol):
    """Weights as a model is to have them, by name."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> Shape: ...

    def nbytes(self, name: str) -> int:
        """Bytes of the weight as it is handed out."""

    def stored_bytes(self, name: str) -> int:
        """Bytes that are read for the weight."""

    def read(self, name: str) -> Tensor:
        """The whole weight, on the device."""

    def tiles(self, name: str, height: int) -> Iterator[tuple[range, Tensor]]:
        """The weight in tiles of about `height` rows, [rows, columns] on the device; the next overwrites the last."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed that was read since this was last called."""


class WeightSource:
    """The weights that a plan of dense output would write, by name; use as a context manager."""

    def __init__(self, plan: Plan, device: Device, on_bytes: OnBytes) -> None:
        steps = [placed.step for shard in plan.shards for placed in shard.steps]
        self._steps: Mapping[str, Copy | Rewrite] = {
            step.name: step for step in steps if isinstance(step, Copy | Rewrite)
        }
        self._device, self._on_bytes = device, on_bytes
        self._reader = TensorReader()
        self._workers = Workers(max(1, plan.memory.workers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()
        self._workers.__exit__(*exc)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._steps)

    def shape(self, name: str) -> Shape:
        return self._steps[name].specs[0].shape

    def nbytes(self, name: str) -> int:
        """Bytes of the weight as it is handed out."""
        return self._steps[name].specs[0].nbytes

    def stored_bytes(self, name: str) -> int:
        """Bytes that are read for the weight."""
        step = self._steps[name]
        if isinstance(step, Copy):
            return step.tensor.nbytes
        weight = step.weight
        again = step.access is not Access.ROW and weight.decoder.order is None
        return (
            sum(part.nbytes for part in weight.parts.values())
            + again * weight.parts[weight.decoder.main].nbytes
        )

    def read(self, name: str) -> Tensor:
        """The whole weight, on the device."""
        shape = self.shape(name)
        whole = torch.empty(shape, dtype=self._dtype(name), device=self._device.torch)
        for _ in self.tiles(name, matrix_shape(shape)[0], whole):  # one tile, which is all of it
            pass
        return whole

    def tiles(self, name: str, height: int, into: Tensor | None = None) -> Iterator[tuple[range, Tensor]]:
        """The weight in tiles of about `height` rows, whole cells, each [rows, columns] on the device.

        They are parts of `into`, if given; else of memory that the next tile overwrites.
        """
        count, columns = matrix_shape(self.shape(name))
        step = self._steps[name]
        height = -(-height // CELL_ROWS) * CELL_ROWS
        cell = min(self._cell_rows(step), height)
        height = min(count, height // cell * cell)
        if into is None:
            into = torch.empty(height, columns, dtype=self._dtype(name), device=self._device.torch)
        memory = into.view(count if into.numel() == count * columns else height, columns)
        fill, finish = self._open(step, cell)
        for first in range(0, count, max(1, height)):
            rows = range(first, min(first + height, count))
            tile = memory[: len(rows)]
            fill(rows, tile.view(-1).view(torch.uint8))
            if rows.stop == count:
                finish()
            yield rows, tile
        self._on_bytes(self.stored_bytes(name))

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed that was read since this was last called."""
        self._reader.check_recent()

    def _dtype(self, name: str) -> torch.dtype:
        return self._steps[name].specs[0].dtype.torch

    def _cell_rows(self, step: Copy | Rewrite) -> int:
        """Rows of a cell: on a GPU many, because starting an operation costs as much as doing it to a few."""
        return cell_rows(self._device, step) if isinstance(step, Rewrite) else CELL_ROWS

    def _open(
        self, step: Copy | Rewrite, cell: int
    ) -> tuple[Callable[[range, Tensor], None], Callable[[], object]]:
        """Reader that fills memory (uint8, flat) with given rows of the weight, in row order, `cell` of them at a time.

        What it returns beside that is called after the last of them: it raises InputError for a value on a GPU that is
        not finite, where to look at each cell would have the GPU waited for.
        """
        if isinstance(step, Copy):
            return (lambda rows, out: self._copy(step, rows, out)), lambda: None
        engine = DirectEngine(self._workers, self._device.torch, cell, not self._device.is_cpu)
        stored = StoredRows(self._reader, step.weight)
        tiles = self._read(step, stored, range(step.rows), cell)
        opened = open_weight(self._reader, [step], engine, tiles)
        return (
            lambda rows, out: self._rewrite(step, opened, stored, rows, out, cell)
        ), lambda: opened.finish(0)

    def _copy(self, step: Copy, rows: range, out: Tensor) -> None:
        start = rows.start * (out.numel() // max(1, len(rows)))
        if self._device.is_cpu:
            self._reader.read_into(step.tensor, start, tensor_bytes(out))
            return
        stage = torch.empty(min(out.numel(), BUFFER_BYTES), dtype=torch.uint8)
        for first in range(0, out.numel(), BUFFER_BYTES):
            part = out[first : first + BUFFER_BYTES]
            host = stage[: part.numel()]
            self._reader.read_into(step.tensor, start + first, tensor_bytes(host))
            part.copy_(host)

    def _rewrite(
        self,
        step: Rewrite,
        opened: OpenedWeight,
        stored: StoredRows,
        rows: range,
        out: Tensor,
        cell: int,
    ) -> None:
        offset = step.encoder.row_offset
        for tile, raw in self._read(step, stored, rows, cell):
            start, stop = offset(tile.start) - offset(rows.start), offset(tile.stop) - offset(rows.start)
            opened.rewrite(raw, tile, [out[start:stop]]).wait()

    def _read(
        self, step: Rewrite, stored: StoredRows, rows: range, cell: int
    ) -> Iterator[tuple[range, Tensor]]:
        """Stored bytes of `rows`, a tile at a time, on the device; the next tile overwrites them."""
        return read_tiles(stored, rows, tile_rows(step, BUFFER_BYTES, cell), self._device.torch)
