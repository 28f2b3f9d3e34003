"""Reads weights tile by tile and has them rewritten in every view, by the code that merges, for watchers to measure.

What is written goes nowhere. Each group of a weight's views is read once, again where a view needs a pass before, and
again for outliers: these are counted from the base's own mean and deviation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.analysis.prediction import predicted_kept
from streamconv.analysis.rounded import CodesWatch, GridSums, RoundedSums, is_on_grid
from streamconv.analysis.sums import CentralMoments, Outliers, UpdateSums, outliers, total, update_sums
from streamconv.analysis.views import AnalyzedWeight, View, ViewGroup
from streamconv.checkpoint.reader import TensorReader
from streamconv.formats.kinds import is_surveyed
from streamconv.formats.rows import StoredRows
from streamconv.planning.devices import Device
from streamconv.planning.plan import Access, Rewrite, cell_rows, tile_rows
from streamconv.progress import OnBytes
from streamconv.running.cell import Seen
from streamconv.running.cells import WeightWork
from streamconv.running.direct import DirectEngine
from streamconv.running.opened import open_weight, read_tiles
from streamconv.running.surveying import bytes_surveyed, greatest_magnitude
from streamconv.running.workers import Inline, Workers


@dataclass(frozen=True, slots=True)
class DenseSums:
    """Sums over one target of a weight, or over several: the update, and its effect on the distribution."""

    update: UpdateSums
    outliers: Outliers

    def __add__(self, other: DenseSums) -> DenseSums:
        return DenseSums(self.update + other.update, self.outliers + other.outliers)


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured of one weight.

    By target; by target and format; by target, format and rounding.
    """

    dense: Mapping[str, DenseSums]
    grids: Mapping[tuple[str, str], GridSums]
    rounded: Mapping[tuple[str, str, str], RoundedSums]


class UpdateWatch:
    """Watches a weight being rewritten dense, twice: the second time, outliers are counted."""

    def __init__(self, step: Rewrite, height: int) -> None:
        self._step, self._height = step, height
        self._cells: dict[int, UpdateSums] = {}
        self._outliers: dict[int, Outliers] = {}
        self._base: CentralMoments | None = None

    def __call__(self, seen: Seen) -> None:
        number = seen.rows.start // self._height
        if self._base is None:
            self._cells[number] = update_sums(seen, self._step.encoder)
        else:
            self._outliers[number] = outliers(seen, self._base)

    def between(self) -> None:
        """The first pass is over."""
        self._base = self._sums().before

    def result(self) -> DenseSums:
        return DenseSums(self._sums(), total(self._outliers[number] for number in sorted(self._outliers)))

    def _sums(self) -> UpdateSums:
        return total(self._cells[number] for number in sorted(self._cells))


@dataclass(frozen=True, slots=True)
class _Open:
    """A view in work."""

    view: View
    work: WeightWork
    watch: UpdateWatch | CodesWatch


def bytes_to_read(subject: AnalyzedWeight) -> int:
    """Bytes of the main parts, for all groups and passes."""
    main = subject.step.weight.parts[subject.step.weight.decoder.main].nbytes
    surveys = (step for group in subject.groups for step in _to_survey(group).values())
    return main * sum(_passes(group) for group in subject.groups) + sum(map(bytes_surveyed, surveys))


def measure(
    subject: AnalyzedWeight, reader: TensorReader, device: Device, seed: int, on_bytes: OnBytes
) -> Measured:
    """Every view of a weight. Raises InputError where a value is not finite."""
    dense: dict[str, DenseSums] = {}
    grids: dict[tuple[str, str], GridSums] = {}
    rounded: dict[tuple[str, str, str], RoundedSums] = {}
    for group in subject.groups:
        for each in _worked(group, reader, device, seed, on_bytes):
            view, watch = each.view, each.watch
            if isinstance(watch, UpdateWatch):
                dense[view.target] = watch.result()
                continue
            assert view.format is not None
            assert view.rounding is not None
            _, kept = each.work.finish()
            assert kept is not None
            rounded[view.target, view.format, view.rounding] = watch.rounded(
                kept, each.work.effective_scales()
            )
            if view.measures_grid:
                grids[view.target, view.format] = watch.grid()
    return Measured(
        dense, {key: _predicted(subject, key, grids[key], dense[key[0]]) for key in grids}, rounded
    )


def _predicted(subject: AnalyzedWeight, key: tuple[str, str], found: GridSums, dense: DenseSums) -> GridSums:
    """`found` with what nearest rounding is predicted to keep of the update, where the base is on the grid."""
    (step,) = (
        view.step
        for group in subject.groups
        for view in group.views
        if view.measures_grid and (view.target, view.format) == key
    )
    grid, update = step.encoder.grid, dense.update
    if not is_on_grid(step) or grid is None or not found.steps:
        return found
    ratio = update.magnitudes / found.steps  # of equal counts
    return replace(
        found, predicted=predicted_kept(ratio, grid, update.update.kurtosis) * update.update.squares
    )


def _worked(
    group: ViewGroup, reader: TensorReader, device: Device, seed: int, on_bytes: OnBytes
) -> Sequence[_Open]:
    """The views of a group when all has been seen of them."""
    with ExitStack() as stack:
        workers: Workers | Inline = Inline()
        if device.is_cpu:
            workers = stack.enter_context(Workers(group.memory.workers))
        group = _surveyed(group, reader, workers, device, on_bytes)
        tiles = _Tiles(group, reader, device, on_bytes)
        steps, watches = [view.step for view in group.views], [_watch(view, tiles) for view in group.views]
        engine = DirectEngine(workers, device.torch, tiles.height)
        works = open_weight(reader, steps, engine, tiles.read(), seed, watches).works
        opened = [_Open(*each) for each in zip(group.views, works, watches, strict=True)]
        if dense := [each for each in opened if isinstance(each.watch, UpdateWatch)]:
            tiles.rewrite([each.work for each in dense])
            for each in dense:
                assert isinstance(each.watch, UpdateWatch)
                each.watch.between()
        tiles.rewrite([each.work for each in opened])
        return opened


def _to_survey(group: ViewGroup) -> Mapping[str, Rewrite]:
    """Steps by target, one of each, whose encoders have a scale for all of the weight that is not known yet."""
    return {
        view.target: view.step
        for view in group.views
        if is_surveyed(view.step.encoder) and not view.step.encoder.is_known
    }


def _surveyed(
    group: ViewGroup, reader: TensorReader, workers: Workers | Inline, device: Device, on_bytes: OnBytes
) -> ViewGroup:
    """The group with encoders that know the scale of this weight alone, whatever partners it has in an output."""
    greatest = {
        target: greatest_magnitude(step, reader, workers, device, group.memory, on_bytes)
        for target, step in _to_survey(group).items()
    }

    def known(view: View) -> View:
        encoder = view.step.encoder
        if not is_surveyed(encoder) or encoder.is_known:
            return view
        return replace(view, step=replace(view.step, encoder=encoder.knowing(greatest[view.target])))

    return replace(group, views=tuple(map(known, group.views)))


def _watch(view: View, tiles: _Tiles) -> UpdateWatch | CodesWatch:
    if view.rounding is None:
        return UpdateWatch(view.step, tiles.height)
    return CodesWatch(view.step, tiles.height, tiles.device.torch, view.measures_grid)


class _Tiles:
    """The tiles of one weight, each read for all views of a group."""

    def __init__(self, group: ViewGroup, reader: TensorReader, device: Device, on_bytes: OnBytes) -> None:
        steps = [view.step for view in group.views]
        self.device, self.height = device, max(cell_rows(device, step) for step in steps)
        self._step, self._on_bytes = steps[0], on_bytes
        self._rows = min(tile_rows(step, group.memory.buffer, self.height) for step in steps)
        self._stored = StoredRows(reader, self._step.weight)

    def read(self) -> Iterator[tuple[range, Tensor]]:
        """Stored bytes, tile by tile, on the device; the next tile overwrites them."""
        for rows, raw in read_tiles(self._stored, range(self._step.rows), self._rows, self.device.torch):
            yield rows, raw
            self._on_bytes(raw.numel())

    def rewrite(self, works: Sequence[WeightWork]) -> None:
        """One pass; all write to the same place, which nobody reads."""
        longest = max(work.step.encoder.row_offset(min(self._rows, work.step.rows)) for work in works)
        out = torch.empty(longest, dtype=torch.uint8, device=self.device.torch)
        for rows, raw in self.read():
            for work in works:
                offset = work.step.encoder.row_offset
                work.rewrite(raw, rows, out[: offset(rows.stop) - offset(rows.start)]).wait()


def _passes(group: ViewGroup) -> int:
    """Count the readings of a weight for a group."""
    reduces = any(view.step.access is not Access.ROW for view in group.views)
    return 1 + reduces + any(view.rounding is None for view in group.views)
