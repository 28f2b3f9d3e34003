"""A weight that was calibrated, weighed anew without the text: its codes and scales as they lie in the output's file.

What was kept of the update is computed by the code that did it when the weight was made, so that it comes out the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.formats.base import Weight
from streamconv.formats.rows import StoredRows
from streamconv.planning.devices import Device
from streamconv.planning.plan import Rewrite, cell_rows, tile_rows
from streamconv.planning.scales import FRESH
from streamconv.running.cell import KeptDelta
from streamconv.running.cells import WeightWork
from streamconv.running.direct import DirectEngine
from streamconv.running.opened import load_side, open_weight, read_tiles
from streamconv.running.scales import Fixed
from streamconv.running.workers import Workers

_TILE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Weighed:
    """`kept` is None where the weight had no update; `error` is ||T - Q|| / ||T||."""

    kept: KeptDelta | None
    error: float


def weigh(step: Rewrite, written: Weight, device: Device, reader: TensorReader, workers: Workers) -> Weighed:
    """`written` against the target that `step` makes of base and adapter. Holds a byte for each of its entries.

    Raises CheckpointError where a scale is not finite.
    """
    on = device.torch
    scales = written.decoder.scales(load_side(reader, written, on))
    assert scales is not None, f"{written.name} is stored dense"
    # Codes and scales are known: nothing is to be rounded, nor searched for before.
    step = replace(step, rounding=None, scales=FRESH, calibrated=False)
    height = cell_rows(device, step)
    bases, stored = (_Stored(weight, step, height, on, reader) for weight in (step.weight, written))
    work = open_weight(reader, [step], DirectEngine(workers, on, height), bases.tiles()).works[0]
    codes = torch.empty(step.rows * step.columns, dtype=torch.uint8, device=on)
    for rows, raw in stored.tiles():
        codes[rows.start * step.columns : rows.stop * step.columns] = written.decoder.codes(raw, rows)
    work.use(Fixed(scales, scales), codes)
    error = _error(work, written, scales, bases, stored)
    return Weighed(work.finish()[1], error)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A weight's main part, in tiles of as many rows as those of `step` may be."""

    weight: Weight
    step: Rewrite
    height: int
    on: torch.device
    reader: TensorReader

    def tiles(self) -> Iterator[tuple[range, Tensor]]:
        stored, count = StoredRows(self.reader, self.weight), tile_rows(self.step, _TILE_BYTES, self.height)
        return read_tiles(stored, range(self.step.rows), count, self.on)


def _error(work: WeightWork, written: Weight, scales: Tensor, bases: _Stored, stored: _Stored) -> float:
    """||T - Q|| / ||T||; and every tile of `work` rewritten."""
    grid, step = written.decoder.grid, work.step
    assert grid is not None
    sizes = torch.zeros(2, dtype=torch.float64, device=work.device)
    for (rows, raw), (_, codes) in zip(bases.tiles(), stored.tiles(), strict=True):
        target = torch.empty(len(rows), step.columns, device=work.device)
        work.targets(raw, rows, target)
        first, last = rows.start * step.columns // grid.block, -(-rows.stop * step.columns // grid.block)
        found = written.decoder.decode(codes, rows, scales[first:last], torch.empty_like(target))
        distance = torch.sub(target, found, out=found)
        sizes += torch.stack([each.square().sum(dtype=torch.float64) for each in (distance, target)])
        work.rewrite(raw, rows, torch.empty_like(codes)).wait()
    error, size = sizes.tolist()
    return math.sqrt(error / size) if size else math.sqrt(error)
