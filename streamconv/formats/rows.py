"""The rows of a weight's main part, whatever order a file has its bytes in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, placed, tensor_bytes
from streamconv.formats.base import Order, Weight, matrix_shape

_RUN_BYTES = 8 * 2**20


class StoredRows:
    """The main part of `weight`, by rows.

    Read as they are asked for; but where a file has them in another order, the row form is read whole, here, and held.
    `buffer` is memory for a run of lines, uint8.
    """

    def __init__(self, reader: TensorReader, weight: Weight, buffer: Tensor | None = None) -> None:
        self._reader, self._offset = reader, weight.decoder.row_offset
        self._main = weight.parts[weight.decoder.main]
        self._form: Tensor | None = None
        order = weight.decoder.order
        if order is None:
            return
        self._form = torch.empty(self._offset(matrix_shape(weight.shape)[0]), dtype=torch.uint8)
        nbytes = max(order.line_bytes, min(_RUN_BYTES, self._main.nbytes))
        buffer = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer
        for lines in runs(order, buffer.numel()):
            raw = buffer[: len(lines) * order.line_bytes]
            reader.read_into(self._main, lines.start * order.line_bytes, tensor_bytes(raw))
            order.from_file(raw, lines, self._form)
        reader.drop_cache(self._main, 0, self._main.nbytes)

    def nbytes(self, rows: range) -> int:
        return self._offset(rows.stop) - self._offset(rows.start)

    def place(self, rows: range, memory: Tensor) -> Tensor:
        """The part of `memory` (uint8, flat) into which the bytes of `rows` are best read."""
        if self._form is None:
            return placed(memory, self._main.offset + self._offset(rows.start), self.nbytes(rows))
        return memory[: self.nbytes(rows)]

    def read_into(self, rows: range, out: Tensor) -> None:
        """Fill `out` (uint8, flat) with the bytes of `rows`, which start on a cell."""
        start = self._offset(rows.start)
        if self._form is None:
            self._reader.read_into(self._main, start, tensor_bytes(out))
        else:
            out.copy_(self._form[start : start + out.numel()])

    def drop_cache(self, rows: range) -> None:
        """Let the kernel forget these rows: they will not be read again."""
        if self._form is None:
            self._reader.drop_cache(self._main, self._offset(rows.start), self.nbytes(rows))


def runs(order: Order, nbytes: int) -> Iterator[range]:
    """All lines, as many at a time as `nbytes` hold."""
    count = nbytes // order.line_bytes
    assert count, f"{nbytes} bytes do not hold a line of {order.line_bytes}"
    for first in range(0, order.lines, count):
        yield range(first, min(first + count, order.lines))


def in_file_order(order: Order | None, form: Tensor) -> Tensor:
    """The bytes of a main part as the file has them, from its row form, whole (uint8, flat, in host memory)."""
    if order is None:
        return form
    out = torch.empty_like(form)
    order.to_file(form, range(order.lines), out)
    return out
