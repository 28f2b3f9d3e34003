"""One weight, cell by cell: decode, apply, choose, pack. The one place where the maths of a merge runs.

A cell is some rows at full width, 64 on a CPU and more on a GPU (`plan.cell_rows`). Everything here is a function of
one cell and of what was known before the weight began (its scales, the adapter's parts, the end of the reduce pass), so
neither tile size nor memory budget nor interruption can change a byte. Arithmetic is float32 with one rounding, where
the cell is packed.

Kept delta: with D = target - B and Q what is written, the share of the update that survives quantization is

    kept = <Q - B, D> / ||D||²,    B = the target's own base

Scales of double-quantized storage are only final when the last cell is done, so for every block the inner
product <codes' grid values, D> is held (one float) and multiplied by the final scale at the end: exact, and
in the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor

from streamconv.adapters.base import Parts, State, UpdateAccess
from streamconv.dtypes import F32
from streamconv.errors import InputError
from streamconv.formats.base import CELL_ROWS, Encoder, Overwriting
from streamconv.formats.kinds import is_surveyed
from streamconv.kernels import TORCH, kernels_for, ordered, pairwise_sum
from streamconv.kernels.grids import DecodedGrid, Grid, empty_scales
from streamconv.planning.plan import Rewrite
from streamconv.planning.scales import FRESH, Fresh, OfBase, lies_on_grid
from streamconv.rounding import uniform
from streamconv.rounding.adaptive import Adaptive, delta_to_step
from streamconv.rounding.base import Context, Rounding
from streamconv.rounding.search import searched_scales
from streamconv.running.cell import CellBase, KeptDelta, Seen, Watch, cells, inner_product
from streamconv.running.scales import Fixed, Kept, Scales, fixed_scales, kept_scales
from streamconv.running.workers import Inline, Scratch, Ticket, Workers


class WeightWork:
    """State of one weight while its tiles pass in row order, first through `reduce` if planned, then `rewrite`.

    `side` are the base's parts other than the main one, `parts` the tensors in float32 of all that is applied,
    one mapping each; all on the computing device. Cells have `height` rows, a multiple of 64. `defers`: values are
    looked at when the weight is finished, all at once, because a device would have to be waited for at every cell.
    `watch` is called with each cell of the second pass by the worker that has just done it, in no order among cells.

    A part of the work that failed for want of memory can be repeated: cells write to their places, and states of
    updates are kept only once a tile has passed. `overwrites` is the encoder where it writes over the base's own bytes.

    `scales` and `rounding` begin as planned; what is decided before the second pass, or by its first cell, changes
    them (`use`), and never the step. Where codes are chosen for the whole weight at once, `targets` and `base_codes`
    say what from, and `use` is told what they are; `rewrite` then packs and weighs these.
    """

    def __init__(
        self,
        step: Rewrite,
        side: Mapping[str, Tensor],
        parts: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        seed: int,
        workers: Workers | Inline,
        height: int = CELL_ROWS,
        defers: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.step, self.side, self.parts, self.seed, self._watch = step, side, parts, seed, watch
        self.device, self.workers, self.height = device, workers, height
        # Loading compiled kernels takes time and memory, which a merge in 16 bit has no use for.
        is_dense = step.merge_base is None and step.encoder.grid is None and step.weight.decoder.grid is None
        self._kernels = TORCH if is_dense else kernels_for(device)
        if device.type != "cpu":
            self._prepare_grids()
        self._prepared = self._prepare()
        self._states: list[State] = [() for _ in step.applied]
        # What cells leave behind is written to its place in tensors allocated at once. As small tensors of their
        # own, they would lie between freed cells on the heap, which could not shrink: up to 5 times the memory.
        self._absmax = self._one_a_block(step.merge_base)  # of the base that `reduce` sees
        self._gathered = self._one_a_block(step.encoder)  # scales as they are chosen, cell by cell
        self._inner = self._one_a_block(step.encoder)
        # The sums of KeptDelta for every cell, with <B, D> for the first.
        count = -(-step.rows // height)
        self._sums = torch.zeros(count, 3, dtype=torch.float64, device=device)
        # Least and greatest value of every cell.
        self._extremes = torch.zeros(count, 2, device=device) if defers else None
        self._base_scales = step.weight.decoder.scales(side)  # effective, one a block
        is_own = lies_on_grid(step.weight, step.merge_base, step.encoder, step.equalizer)
        self.overwrites = step.encoder if is_own and isinstance(step.encoder, Overwriting) else None
        self._codes: Tensor | None = None  # of the whole weight, where they are known before
        self._rounding = None if isinstance(step.rounding, Adaptive) else step.rounding
        self.scales: Scales = self._known_scales()

    @property
    def rounding(self) -> Rounding | None:
        """Rounding of cells; None where nothing is rounded, or until adaptive rounding has seen the first of them."""
        return self._rounding

    def _known_scales(self, rounded: Fixed | None = None) -> Scales:
        """The planned scales, or what is known of them: at the beginning, and after the first pass.

        `rounded` are scales of a base that is rounded first.
        """
        planned, merge_base = self.step.scales, self.step.merge_base
        if isinstance(planned, Fresh) or self._base_scales is None:
            return planned
        encoder = self.step.encoder
        if is_surveyed(encoder) and encoder.outgrows(self._base_scales):
            return FRESH
        is_stored = merge_base is not None and merge_base.format == encoder.format
        return kept_scales(planned, self._base_scales, rounded if is_stored else None, encoder, self.side)

    def _prepare_grids(self) -> None:
        """Have tables of all grids on the device now, where it is waited for, and not with the first cell."""
        encoders = [encoder for encoder in (self.step.encoder, self.step.merge_base) if encoder is not None]
        for grid in (self.step.weight.decoder.grid, *(encoder.grid for encoder in encoders)):
            if grid is not None:
                ordered.prepare(grid, self.device)

    def _prepare(self) -> Sequence[Parts]:
        """Have updates prepare their parts, once a weight; by one worker, where there is something to compute."""
        prepared: list[Parts] = []

        def prepare(number: int) -> None:
            del number
            pairs = zip(self.step.applied, self.parts, strict=True)
            prepared.extend(update.prepare(parts, self.device) for update, parts in pairs)

        if any(update.held_bytes for update in self.step.applied):
            self.workers.alone(prepare)
        else:
            prepare(0)  # parts as they are: no need to wait for cells of another weight
        return prepared

    # -- the two passes ----------------------------------------------------------------------------------

    def reduce(self, raw: Tensor, rows: range) -> None:
        """First pass, where access says so: scales of the rounded base, or of the output, or states of updates."""
        if self.step.merge_base is not None:
            self._map(lambda number, part: self._take_absmax(number, raw, rows, part), rows)
        if self.step.searches_first:
            self._map(lambda number, part: self._take_searched(number, raw, rows, part), rows)
        if self.step.merge_base is not None or self.step.searches_first:
            return
        self.workers.alone(lambda number: self._take_states(number, raw, rows))

    def end_reduce(self) -> None:
        """Conclude the first pass: from here on the rounded base's scales are known, and what updates had to learn."""
        self.conclude_updates()
        self.know_scales()

    def conclude_updates(self) -> None:
        """First half of `end_reduce`: what it needs is used up, so that it cannot be repeated."""
        for number, update in enumerate(self.step.updates):
            if self._states[number]:
                self._states[number] = update.conclude(self._prepared[number], self._states[number])

    def know_scales(self) -> None:
        """Second half of `end_reduce`."""
        if self.step.merge_base is not None:
            rounded = fixed_scales(self._absmax, self.step.merge_base)
            self._base_scales = rounded.effective
            self.scales = self._known_scales(rounded)
        if self.step.searches_first:
            self.use(fixed_scales(self._gathered, self.step.encoder))

    def use(self, scales: Fresh | Kept | Fixed, codes: Tensor | None = None) -> None:
        """Have `rewrite` write these scales, and `codes` (uint8, flat, of the whole weight) if they are known.

        With codes, scales are known too.
        """
        assert codes is None or not isinstance(scales, Fresh), f"{self.step.name}: codes without scales"
        self.scales, self._codes = scales, codes

    def rewrite(self, raw: Tensor, rows: range, out: Tensor) -> Ticket:
        """Second pass: `out` (uint8) will hold the main part's bytes of `rows` once the ticket has been waited for."""
        if self._codes is None:
            self.settle(raw, rows)
        return self.workers.submit(
            lambda number, part: self._rewrite(number, raw, rows, out, part), rows, self.height
        )

    @property
    def is_settled(self) -> bool:
        """Whether nothing of how cells are rounded is left to the first of them."""
        return self._codes is not None or self._rounding is not None or self.step.rounding is None

    def settle(self, raw: Tensor, rows: range) -> Rounding | None:
        """Rounding of cells, which adaptive rounding decides by the first rows, those of the first tile among them."""
        adaptive = self.step.rounding
        if self._rounding is None and isinstance(adaptive, Adaptive):
            self.workers.alone(lambda number: self._settle_rounding(number, raw, rows, adaptive))
        return self._rounding

    def finish(self) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        """The parts after the main one, and what survived of the update (None if nothing was quantized).

        Raises InputError where a value is not finite, if that was deferred.
        """
        self._check_extremes()
        encoder = self.step.encoder
        if encoder.grid is None:
            return encoder.finish(None, None), None
        if encoder.nested and isinstance(self.scales, Fresh | OfBase):
            self.scales = fixed_scales(self._gathered, encoder)
        tail = self._finished_parts()
        if not self.step.updates:
            return tail, None
        effective = self.effective_scales()
        base_inner, delta, error = pairwise_sum(self._sums.T.contiguous()).tolist()
        inner = inner_product(effective.view(-1), self._inner.view(-1)) / encoder.grid.peak
        return tail, KeptDelta(inner - base_inner, delta, error)

    def effective_scales(self) -> Tensor:
        """Scales that a loader will multiply codes by, one a block; known when the last cell is done."""
        match self.scales:
            case Fresh() | OfBase():
                return self.step.encoder.effective_scales(self._gathered)
            case Kept(effective=effective) | Fixed(effective=effective):
                return effective
            case _:
                assert_never(self.scales)

    def _finished_parts(self) -> tuple[bytes, ...]:
        """The parts after the main one."""
        match self.scales:
            case Fresh() | OfBase():
                return self.step.encoder.finish(self._gathered, None)
            case Kept(stored=stored, parts=parts) | Fixed(stored=stored, parts=parts):
                return self.step.encoder.finish(stored, parts)
            case _:
                assert_never(self.scales)

    def greatest(self, raw: Tensor, rows: range, out: Tensor) -> None:
        """Write the greatest magnitude of each cell's target to its place in `out`: float32, an entry a cell."""
        self._map(lambda number, part: self._take_greatest(number, raw, rows, out, part), rows)

    # -- codes chosen for the whole weight -------------------------------------------------------------------

    def targets(self, raw: Tensor, rows: range, out: Tensor) -> None:
        """Write what the output is to come near, float32 [rows, columns], to `out`."""
        self._map(lambda number, part: self._take_targets(number, raw, rows, out, part), rows)

    def bases(self, raw: Tensor, rows: range, out: Tensor) -> None:
        """Write what targets are an update of, float32 [rows, columns], to `out`."""
        self._map(lambda number, part: self._take_bases(number, raw, rows, out, part), rows)

    def base_codes(self, raw: Tensor, rows: range, out: Tensor) -> None:
        """Write the base's own codes (uint8, flat) to `out`; only where the base lies on a grid."""
        self._map(lambda number, part: self._take_base_codes(number, raw, rows, out, part), rows)

    def _take_targets(self, number: int, raw: Tensor, rows: range, out: Tensor, part: range) -> None:
        for cell, base in self._bases(number, raw, rows, part):
            target = self._target(base.values, cell)
            self._check_finite(target, cell, target)
            out[cell.start - rows.start : cell.stop - rows.start].copy_(target)

    def _take_greatest(self, number: int, raw: Tensor, rows: range, out: Tensor, part: range) -> None:
        for cell, base in self._bases(number, raw, rows, part):
            target = self._target(base.values, cell)
            greatest = torch.stack(torch.aminmax(target)).abs().amax()
            self._check_finite(target, cell, greatest)
            out[cell.start // self.height] = greatest

    def _take_bases(self, number: int, raw: Tensor, rows: range, out: Tensor, part: range) -> None:
        for cell, base in self._bases(number, raw, rows, part):
            self._equalize(base.values, cell)
            out[cell.start - rows.start : cell.stop - rows.start].copy_(base.values)

    def _take_base_codes(self, number: int, raw: Tensor, rows: range, out: Tensor, part: range) -> None:
        columns = self.step.columns
        for cell, base in self._bases(number, raw, rows, part):
            assert base.codes is not None, f"{self.step.name}: the base lies on no grid"
            if (
                self.overwrites is not None
                and self.overwrites.grid is not None
                and base.effective is not None
            ):
                self._gather(base.effective, cell, self.overwrites.grid)
            first, last = ((row - rows.start) * columns for row in (cell.start, cell.stop))
            out[first:last].copy_(base.codes)

    def _bases(self, number: int, raw: Tensor, rows: range, part: range) -> Iterator[tuple[range, CellBase]]:
        """Cells of `part` with their base; each is gone when the next one comes."""
        for cell in cells(part, self.height):
            yield cell, self._base(self._raw(raw, rows, cell), cell, self.workers.scratch[number])

    def _map(self, work: Callable[[int, range], None], rows: range) -> None:
        """Have workers do `rows` in whole cells."""
        self.workers.map(work, rows, self.height)

    # -- the cells of one worker -------------------------------------------------------------------------

    def _raw(self, raw: Tensor, rows: range, part: range) -> Tensor:
        """The bytes of `part` among those of the tile `rows`."""
        offset = self.step.weight.decoder.row_offset
        first = offset(rows.start)
        return raw[offset(part.start) - first : offset(part.stop) - first]

    def _take_absmax(self, number: int, raw: Tensor, rows: range, part: range) -> None:
        merge_base = self.step.merge_base
        assert merge_base is not None
        assert merge_base.grid is not None
        for cell in cells(part, self.height):
            values = self._decode(self._raw(raw, rows, cell), cell, self.workers.scratch[number]).view(-1)
            out = self._blocks(self._absmax, cell, merge_base.grid)
            self._kernels.starting_scales(values, merge_base.grid, out)

    def _take_searched(self, number: int, raw: Tensor, rows: range, part: range) -> None:
        """A base that is rounded first has its scales here as they were before nesting: near enough for a search."""
        grid = self.step.encoder.grid
        assert grid is not None
        for cell, base in self._bases(number, raw, rows, part):
            target = self._target(base.values, cell).flatten()
            self._blocks(self._gathered, cell, grid).copy_(searched_scales(target, grid))

    def _take_states(self, number: int, raw: Tensor, rows: range) -> None:
        states = list(self._states)
        for cell in cells(rows, self.height):
            cell_raw = self._raw(raw, rows, cell)
            for index, update in enumerate(self.step.updates):
                if update.access is not UpdateAccess.ROW:
                    base = self._base(cell_raw, cell, self.workers.scratch[number]).values
                    states[index] = update.reduce(base, cell, self._prepared[index], states[index])
        self._states = states

    def _settle_rounding(self, number: int, raw: Tensor, rows: range, adaptive: Adaptive) -> None:
        """Decide by the first rows, which are in the first tile of any size, how all of the weight is rounded."""
        assert rows.start == 0, f"{self.step.name}: rounding is settled by the first tile"
        cell, grid, ratio = range(min(CELL_ROWS, rows.stop)), self.step.encoder.grid, None
        scratch = self.workers.scratch[number]
        base = self._base(self._raw(raw, rows, cell), cell, scratch)
        if self._keeps_base and grid is not None and base.codes is not None and base.effective is not None:
            target = self._target(self._copy(base.values, cell, scratch), cell)
            ratio = delta_to_step(target.view(-1), base.values.view(-1), base.codes, base.effective, grid)
            self._rounding = adaptive.settled(ratio)
        elif adaptive.looks and self.step.updates and grid is not None and self.step.equalizer is None:
            target = self._target(self._copy(base.values, cell, scratch), cell)
            context = Context(None, None, None, None, self._as_stored)
            ratio = adaptive.ratio_by_look(target.view(-1), base.values.view(-1), grid, context)
            self._rounding = adaptive.settled_by_look(ratio)
        else:
            self._rounding = adaptive.settled(None)
        if not self._rounding.keeps_scales:
            self.use(FRESH)

    def _rewrite(self, number: int, raw: Tensor, rows: range, out: Tensor, part: range) -> None:
        encoder = self.step.encoder
        first = encoder.row_offset(rows.start)
        scratch = self.workers.scratch[number]
        for cell in cells(part, self.height):
            cell_out = out[encoder.row_offset(cell.start) - first : encoder.row_offset(cell.stop) - first]
            base = self._base(self._raw(raw, rows, cell), cell, scratch)
            if encoder.grid is None:
                # Updates may be made in place, and who watches wants to see both.
                values = base.values if self._watch is None else self._copy(base.values, cell, scratch)
                target = self._target(values, cell)
                self._round(target, cell, cell_out)
                self._show(Seen(cell, base, target, None, None, cell_out))
            else:
                self._quantize(base, cell, encoder.grid, cell_out, scratch)

    # -- one cell ------------------------------------------------------------------------------------------

    def _one_a_block(self, encoder: Encoder | None) -> Tensor:
        """A float32 tensor with an entry for every block of `encoder`'s grid; empty if there is none."""
        if encoder is None or encoder.grid is None:
            return torch.empty(0, dtype=torch.float32, device=self.device)
        return empty_scales(self.step.rows * self.step.columns, encoder.grid, self.device)

    def _blocks(self, scales: Tensor, rows: range, grid: Grid) -> Tensor:
        """The entries of `scales` that belong to `rows`; a cell starts on a block boundary."""
        columns = self.step.columns
        return scales[rows.start * columns // grid.block : -(-rows.stop * columns // grid.block)]

    @property
    def _keeps_base(self) -> bool:
        """Whether the output has scales of the base; a base may have codes of another grid."""
        return isinstance(self.scales, OfBase | Kept)

    def _kept_in(self, rows: range, grid: Grid) -> Tensor | None:
        """The base's scales as the output has them, of a cell, where they are known for all of the weight."""
        return self._blocks(self.scales.effective, rows, grid) if isinstance(self.scales, Kept) else None

    def _decode(self, raw: Tensor, rows: range, scratch: Scratch) -> Tensor:
        decoder = self.step.weight.decoder
        scales = self._base_scales
        if scales is not None and decoder.grid is not None:
            scales = self._blocks(scales, rows, decoder.grid)
        return decoder.decode(raw, rows, scales, self._cell("values", rows, scratch))

    def _cell(self, role: str, rows: range, scratch: Scratch) -> Tensor:
        """Memory for a float32 cell [rows, columns]."""
        shape = (len(rows), self.step.columns)
        return scratch.take(role, shape[0] * shape[1], self.device).view(shape)

    def _copy(self, values: Tensor, rows: range, scratch: Scratch) -> Tensor:
        return self._cell("target", rows, scratch).copy_(values)

    def _base(self, raw: Tensor, rows: range, scratch: Scratch) -> CellBase:
        step, decoder = self.step, self.step.weight.decoder
        if step.merge_base is not None:
            return self._rounded_base(raw, rows, step.merge_base, scratch)
        values = self._decode(raw, rows, scratch)
        if self.overwrites is not None:
            codes, own = self.overwrites.unpacked(raw) if self._keeps_base else (None, None)
            return CellBase(values, values, codes, own, raw=raw)
        if decoder.grid is None or step.encoder.grid is None or self._base_scales is None:
            return CellBase(values, values)
        if isinstance(decoder.grid, DecodedGrid):  # no output has it
            return CellBase(values, values)
        codes = decoder.codes(raw, rows)
        scales = self._blocks(self._base_scales, rows, decoder.grid)
        anchor = self._cell("anchor", rows, scratch)
        self._kernels.decode(codes, decoder.grid, scales, F32, anchor.view(-1))
        kept = self._kept_in(rows, decoder.grid)
        return CellBase(values, anchor, codes, kept)

    def _rounded_base(self, raw: Tensor, rows: range, merge_base: Encoder, scratch: Scratch) -> CellBase:
        """The base as QLoRA training saw it: what a loader makes of it once it is rounded to `merge_base`."""
        grid = merge_base.grid
        assert grid is not None
        original, anchor, values = (
            self._cell(role, rows, scratch) for role in ("original", "anchor", "values")
        )
        flat = self.step.weight.decoder.decode(raw, rows, None, original).view(-1)
        codes = scratch.take("base", flat.numel(), self.device, torch.uint8)
        absmax = self._kernels.nearest(flat, grid, None, codes)
        scales = absmax if self._base_scales is None else self._blocks(self._base_scales, rows, grid)
        kept = self._kept_in(rows, grid)
        self._kernels.decode(codes, grid, scales, F32, anchor.view(-1))
        self._kernels.decode(codes, grid, scales, merge_base.dequantized_dtype, values.view(-1))
        error = self._distance(original, values, rows, grid, scratch)
        return CellBase(values, anchor, codes, scales if kept is None else kept, error)

    def _distance(
        self, original: Tensor, rounded: Tensor, rows: range, grid: Grid, scratch: Scratch
    ) -> Tensor:
        """||W - Wq||², both rescaled as the update is that it is compared with; `original` is used up."""
        if self.step.equalizer is not None:
            rounded = self._copy(rounded, rows, scratch)
            self._equalize(rounded, rows)
            self._equalize(original, rows)
        return self._kernels.distance(original.view(-1), rounded.view(-1), grid.block)

    def _target(self, values: Tensor, rows: range) -> Tensor:
        for update, prepared, state in zip(self.step.applied, self._prepared, self._states, strict=True):
            values = update.apply(values, rows, prepared, state)
        return values

    def _equalize(self, values: Tensor, rows: range) -> None:
        """Rescale a base in place as the target is, so that nothing but the update is between the two."""
        if self.step.equalizer is not None:
            self.step.equalizer.apply(values, rows, self._prepared[-1], ())

    def _round(self, target: Tensor, rows: range, out: Tensor) -> None:
        encoder = self.step.encoder
        encoder.pack(target, None, out)
        rounded = out.view(encoder.dtype.torch)
        if self._extremes is not None:
            self._note_extremes(rounded, rows)
        elif rounded.numel():
            # NaN goes through to both; one pass at memory speed, where isfinite of 16-bit types is 30 times slower.
            low, high = torch.aminmax(rounded)
            if not bool(low.isfinite() & high.isfinite()):
                # Says where, unless it was the rounding that made it infinite.
                self._check_finite(target, rows, target)
                raise InputError(
                    f"{self.step.name}: a value does not fit {encoder.dtype.name}, whose greatest is "
                    f"{torch.finfo(encoder.dtype.torch).max:.6g}; choose a wider type with --dtype"
                )

    def _quantize(self, base: CellBase, rows: range, grid: Grid, out: Tensor, scratch: Scratch) -> None:
        step, stays = self.step, self._keeps_base and not self.step.applied and self._codes is None
        if stays and base.codes is not None and base.effective is not None:
            # Already on the output's grid: nothing to round.
            step.encoder.pack(base.codes, base.effective, out)
            self._gather(base.effective, rows, grid)
            return
        values = base.values.view(-1)
        target = values
        if step.applied:
            target = self._target(self._copy(base.values, rows, scratch), rows).flatten()
        if step.equalizer is not None:
            for each in (base.values,) if base.anchor is base.values else (base.values, base.anchor):
                self._equalize(each, rows)
        codes, scales = self._choose(target, base, rows, grid, scratch)
        self._pack(codes, scales, base, target, out)
        self._gather(scales, rows, grid)
        if step.updates:
            inner = self._blocks(self._inner, rows, grid)
            sums = self._sums[rows.start // self.height]
            sums[:2] = self._kernels.kept(codes, grid, target, values, base.anchor.view(-1), inner)
            if base.error is not None:  # an entry set from a number would have a device waited for
                sums[2] = base.error
        self._show(Seen(rows, base, target.view(len(rows), -1), codes, scales, out))

    def _pack(self, codes: Tensor, scales: Tensor, base: CellBase, target: Tensor, out: Tensor) -> None:
        """Write the bytes of a cell to `out`; in the base's own storage, scales that stay and rows that do not change
        have the base's bytes.
        """
        if self.overwrites is None or base.raw is None:
            self.step.encoder.pack(codes, scales, out)
        elif self._keeps_base:
            out.copy_(base.raw)
            self.overwrites.overwrite(codes, out)
        else:
            self.step.encoder.pack(codes, scales, out)
            if self._codes is None:
                stays = (target.view_as(base.values) == base.values).all(dim=1, keepdim=True)
                written, stored = (each.view(len(stays), -1) for each in (out, base.raw))
                torch.where(stays, stored, written, out=written)

    def _show(self, seen: Seen) -> None:
        if self._watch is not None:
            self._watch(seen)

    def _choose(
        self, target: Tensor, base: CellBase, rows: range, grid: Grid, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """Codes (uint8, flat) and scales (float32, one a block) for a cell."""
        step, count = self.step, target.numel()
        own, fixed = self._given(base, rows, grid)
        if self._codes is not None:
            assert fixed is not None
            first = rows.start * step.columns
            return self._codes[first : first + count], fixed
        rounding, noise = self._rounding, None
        assert rounding is not None
        if rounding.needs_noise:
            drawn = scratch.take("noise", count, self.device)
            noise = uniform(self.seed, step.name, rows, step.columns, drawn)
        context = Context(own, fixed, base.values.view(-1), noise, self._as_stored)
        codes = scratch.take("codes", count, self.device, torch.uint8)
        scales = rounding.choose(target, grid, context, codes)
        self._check_finite(target, rows, scales if context.scales is None else target)
        return codes, scales

    @property
    def _as_stored(self) -> Callable[[Tensor], Tensor] | None:
        encoder = self.step.encoder
        return encoder.effective_scales if encoder.rounds_scales else None

    def _given(self, base: CellBase, rows: range, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
        """The base's own codes and the effective scales of a cell, as far as these are not the rounding's to choose."""
        match self.scales:
            case Fresh():
                return None, None
            case OfBase() | Kept():
                return base.codes, base.effective
            case Fixed(effective=effective):
                return None, self._blocks(effective, rows, grid)
            case _:
                assert_never(self.scales)

    def _gather(self, scales: Tensor, rows: range, grid: Grid) -> None:
        """Keep the scales of a cell until the last one is done, unless all were known before the first."""
        if isinstance(self.scales, Fresh | OfBase):
            self._blocks(self._gathered, rows, grid).copy_(scales)

    def _check_finite(self, cell: Tensor, rows: range, telling: Tensor) -> None:
        """Raise if a value of `cell` is NaN or infinite, and with it one of `telling`: the cell, or its greatest.

        A sum is one fast pass, and finite only if every value is.
        """
        if self._extremes is not None:
            self._note_extremes(telling, rows)
            return
        if math.isfinite(telling.sum().item()):
            return
        bad = ~torch.isfinite(cell.view(len(rows), -1))
        if bool(bad.any()):  # else finite values overflowed together, which harms nothing
            row, column = bad.nonzero()[0].tolist()
            raise InputError(
                f"{self.step.name}: the value at row {rows.start + row}, column {column} is "
                f"{cell.view(len(rows), -1)[row, column].item()}, expected a finite number; "
                "look for NaN or infinity in the base and for an adapter that diverged in training"
            )

    def _note_extremes(self, cell: Tensor, rows: range) -> None:
        assert self._extremes is not None
        if cell.numel():
            self._extremes[rows.start // self.height] = torch.stack(torch.aminmax(cell))

    def _check_extremes(self) -> None:
        if self._extremes is None or bool(self._extremes.isfinite().all()):
            return
        first = int((~self._extremes.isfinite()).nonzero()[0, 0]) * self.height
        last = min(first + self.height, self.step.rows) - 1
        name, dtype = self.step.name, self.step.encoder.dtype
        raise InputError(
            f"{name}: a value in rows {first} to {last} is NaN, infinite or too large for {dtype.name}, expected a "
            "finite number; look for NaN or infinity in the base and for an adapter that diverged in training"
        )
