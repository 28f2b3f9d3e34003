"""A survey of one weight: its target seen once, cell by cell, for what must be known of all of it before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.dtypes import F32
from streamconv.formats import FORMATS
from streamconv.formats.rows import StoredRows
from streamconv.planning.devices import Device
from streamconv.planning.plan import Access, Memory, Rewrite, cell_rows, tile_rows
from streamconv.planning.scales import FRESH
from streamconv.progress import OnBytes
from streamconv.rounding.adaptive import Adaptive
from streamconv.running.direct import DirectEngine
from streamconv.running.opened import open_weight, read_tiles
from streamconv.running.workers import Inline, Workers


def surveying(step: Rewrite) -> Rewrite:
    """`step` as a survey carries it out: its target is made, and nothing of it rounded."""
    encoder = FORMATS[F32.name].encoder(step.name, step.weight.shape, F32)
    return replace(step, encoder=encoder, rounding=None, scales=FRESH, calibrated=False)


def bytes_surveyed(step: Rewrite) -> int:
    """Bytes of the base that a survey of `step` reads, as often as it reads them."""
    passes = 1 if surveying(step).access is Access.ROW else 2
    return passes * step.weight.parts[step.weight.decoder.main].nbytes


def greatest_magnitude(
    step: Rewrite,
    reader: TensorReader,
    workers: Workers | Inline,
    device: Device,
    memory: Memory,
    on_bytes: OnBytes,
) -> float:
    """Greatest magnitude of the target of `step`. Raises InputError where a value is not finite.

    `on_bytes` is called with what has been read, a tile at a time: `bytes_surveyed` in all.
    """
    step = surveying(step)
    height = cell_rows(device, step)
    tile = tile_rows(step, memory.buffer, height)
    stored = StoredRows(reader, step.weight)

    def tiles() -> Iterator[tuple[range, Tensor]]:
        for rows, raw in read_tiles(stored, range(step.rows), tile, device.torch):
            yield rows, raw
            on_bytes(raw.numel())

    engine = DirectEngine(workers, device.torch, height)
    (work,) = open_weight(reader, [step], engine, tiles()).works
    found = torch.zeros(-(-step.rows // height), device=device.torch)
    for rows, raw in tiles():
        work.greatest(raw, rows, found)
    return float(found.max()) if step.rows else 0.0


def magnitude_beyond(
    step: Rewrite,
    reader: TensorReader,
    workers: Workers | Inline,
    device: Device,
    memory: Memory,
    on_bytes: OnBytes,
) -> float:
    """The same of a `step` that has scales of its base; 0 where its rounding, as the first rows settle it, keeps all.

    `on_bytes` is called as often as for `greatest_magnitude`, or not at all.
    """
    if isinstance(step.rounding, Adaptive):
        height = cell_rows(device, step)
        first, stored = range(min(height, step.rows)), StoredRows(reader, step.weight)
        engine = DirectEngine(workers, device.torch, height)
        tile = tile_rows(step, memory.buffer, height)
        (work,) = open_weight(
            reader, [step], engine, read_tiles(stored, range(step.rows), tile, device.torch)
        ).works
        _, raw = next(iter(read_tiles(stored, first, height, device.torch)))
        settled = work.settle(raw, first)
        if settled is not None and settled.keeps_scales:
            return 0.0
    return greatest_magnitude(step, reader, workers, device, memory, on_bytes)
