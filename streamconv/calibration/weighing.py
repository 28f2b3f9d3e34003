"""A weight that was calibrated, weighed anew without the text: its codes and scales as they lie in the output's file.

What was kept of the update is computed by the code that did it when the weight was made, so that it comes out the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.formats.base import Weight
from streamconv.formats.rows import StoredRows
from streamconv.planning.devices import Device
from streamconv.planning.plan import Access, Rewrite, cell_rows, tile_rows
from streamconv.planning.scales import FRESH
from streamconv.running.cells import KeptDelta, WeightWork
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
    scales = written.decoder.scales(_side(written, reader, device))
    assert scales is not None, f"{written.name} is stored dense"
    step = replace(step, scales=FRESH, calibrated=False)
    parts = [
        {role: reader.load(part).float().to(on) for role, part in update.parts.items()}
        for update in step.applied
    ]
    side, height = _side(step.weight, reader, device), cell_rows(device, step.columns)
    work = WeightWork(step, side, parts, on, 0, workers, height)
    if step.access is not Access.ROW:
        for rows, raw in _tiles(step.weight, step, height, device, reader):
            work.reduce(raw, rows)
        work.end_reduce()
    codes = torch.cat(
        [written.decoder.codes(raw, rows) for rows, raw in _tiles(written, step, height, device, reader)]
    )
    work.use(Fixed(scales, scales), codes)
    error = _error(step, work, written, scales, height, device, reader)
    return Weighed(work.finish()[1], error)


def _error(
    step: Rewrite,
    work: WeightWork,
    written: Weight,
    scales: Tensor,
    height: int,
    device: Device,
    reader: TensorReader,
) -> float:
    """||T - Q|| / ||T||; and every tile of `work` rewritten."""
    grid = written.decoder.grid
    assert grid is not None
    sizes = torch.zeros(2, dtype=torch.float64, device=device.torch)
    bases = _tiles(step.weight, step, height, device, reader)
    stored = _tiles(written, step, height, device, reader)
    for (rows, raw), (_, codes) in zip(bases, stored, strict=True):
        target = torch.empty(len(rows), step.columns, device=device.torch)
        work.targets(raw, rows, target)
        first, last = rows.start * step.columns // grid.block, -(-rows.stop * step.columns // grid.block)
        found = written.decoder.decode(codes, rows, scales[first:last], torch.empty_like(target))
        distance = torch.sub(target, found, out=found)
        sizes += torch.stack([each.square().sum(dtype=torch.float64) for each in (distance, target)])
        work.rewrite(raw, rows, torch.empty_like(codes)).wait()
    error, size = sizes.tolist()
    return math.sqrt(error / size) if size else math.sqrt(error)


def _side(weight: Weight, reader: TensorReader, device: Device) -> Mapping[str, Tensor]:
    main = weight.decoder.main
    return {role: reader.load(part).to(device.torch) for role, part in weight.parts.items() if role != main}


def _tiles(
    weight: Weight, step: Rewrite, height: int, device: Device, reader: TensorReader
) -> Iterator[tuple[range, Tensor]]:
    """Bytes of a weight's main part, as many rows at a time as those of `step` may be."""
    stored, count = StoredRows(reader, weight), tile_rows(step, _TILE_BYTES, height)
    for first in range(0, step.rows, count):
        rows = range(first, min(first + count, step.rows))
        raw = torch.empty(stored.nbytes(rows), dtype=torch.uint8)
        stored.read_into(rows, raw)
        yield rows, raw.to(device.torch)
