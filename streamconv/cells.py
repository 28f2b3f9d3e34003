"""One weight, cell by cell: decode, apply, choose, pack. The one place where the maths of a merge runs.

A cell is CELL_ROWS rows at full width. Everything here is a function of one cell and of what was known before
the weight began (its scales, the adapter's parts, the end of the reduce pass), so neither tile size nor memory
budget nor interruption can change a byte. Arithmetic is float32 with one rounding, where the cell is packed.

Kept delta: with D = target - B and Q what is written, the share of the update that survives quantization is

    kept = <Q - B, D> / ||D||²,    B = the target's own base

Scales of double-quantized storage are only final when the last cell is done, so for every block the inner
product <codes' grid values, D> is held (one float) and multiplied by the final scale at the end: exact, and
in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamconv.errors import InputError
from streamconv.formats.base import CELL_ROWS
from streamconv.grids import Grid, multiply_by_scales
from streamconv.plan import Rewrite
from streamconv.rounding import ROUNDINGS, uniform
from streamconv.rounding.base import Context
from streamconv.rounding.nearest import absmax_scales


@dataclass(frozen=True, slots=True)
class KeptDelta:
    """Sums over one weight: `kept` is <Q - B, D>, `delta` is ||D||², `base_error` is ||W - Wq||².

    `base_error` is 0 unless the base was rounded first (`--merge-base`).
    """

    kept: float
    delta: float
    base_error: float


@dataclass(frozen=True, slots=True)
class _Base:
    """A cell of the base: what it decodes to, and where it lies on a grid, the codes and scales of that.

    `anchor` is `values` before a loader's cast to the weight's dtype; `effective` are the scales the output
    will have if the base's are kept.
    """

    values: Tensor
    anchor: Tensor
    codes: Tensor | None = None
    effective: Tensor | None = None
    error: float | Tensor = 0.0


def cells(rows: range) -> Iterator[range]:
    """`rows` in cells; `rows` starts on a cell boundary."""
    for first in range(rows.start, rows.stop, CELL_ROWS):
        yield range(first, min(first + CELL_ROWS, rows.stop))


def _scaled(grid: Grid, codes: Tensor, scales: Tensor) -> Tensor:
    values = grid.decode(codes)
    return multiply_by_scales(values, scales, grid.block, out=values)


def _block_sums(values: Tensor, block: int) -> Tensor:
    """Sum of every block of `values` (float32, flat), the last one maybe short."""
    whole = values.numel() - values.numel() % block
    sums = values[:whole].view(-1, block).sum(dim=1)
    return sums if whole == values.numel() else torch.cat((sums, values[whole:].sum().view(1)))


@dataclass(slots=True)
class WeightWork:
    """State of one weight while its tiles pass in row order, first through `reduce` if planned, then `rewrite`.

    `side` are the base's parts other than the main one, `parts` the adapter's tensors in float32, one mapping
    an update; all on the computing device.
    """

    step: Rewrite
    side: Mapping[str, Tensor]
    parts: tuple[Mapping[str, Tensor], ...]
    device: torch.device
    seed: int
    _states: list[Tensor | None] = field(init=False)
    _base_scales: Tensor | None = field(init=False)  # effective scales of the base, one a block
    _kept_scales: Tensor | None = field(init=False, default=None)  # as they go to the encoder, if kept
    _effective: Tensor | None = field(init=False, default=None)  # what a loader makes of the kept scales
    _scales: list[Tensor] = field(init=False, default_factory=list)
    _inner: list[Tensor] = field(init=False, default_factory=list)
    _sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._states = [None] * len(self.step.updates)
        self._base_scales = self.step.weight.decoder.scales(self.side)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self.step.keeps_scales and self._base_scales is not None:
            self._keep(self._base_scales)

    # -- the two passes ------------------------------------------------------------------------------------

    def reduce(self, raw: Tensor, rows: range) -> None:
        """First pass, for steps whose access says so: scales of the rounded base, or states of the updates."""
        merge_base = self.step.merge_base
        for cell_rows, cell_raw in self._split(raw, rows):
            if merge_base is not None:
                assert merge_base.grid is not None
                cell = self._decode(cell_raw, cell_rows).flatten()
                self._scales.append(absmax_scales(cell, merge_base.grid.block))
                continue
            for number, update in enumerate(self.step.updates):
                if update.reduces:
                    cell = self._base(cell_raw, cell_rows).values
                    self._states[number] = update.reduce(
                        cell, cell_rows, self.parts[number], self._states[number]
                    )

    def end_reduce(self) -> None:
        """Between the passes: from here on the rounded base's scales are known."""
        merge_base = self.step.merge_base
        if merge_base is None:
            return
        absmax = torch.cat(self._scales)
        self._scales = []
        self._base_scales = merge_base.effective_scales(absmax)
        if self.step.keeps_scales:
            same = merge_base.format == self.step.encoder.format
            self._keep(absmax if same else self._base_scales)

    def rewrite(self, raw: Tensor, rows: range, out: Tensor) -> None:
        """Second pass: `out` (uint8) receives the main part's bytes of `rows`."""
        offset = self.step.encoder.row_offset
        first = offset(rows.start)
        for cell_rows, cell_raw in self._split(raw, rows):
            cell_out = out[offset(cell_rows.start) - first : offset(cell_rows.stop) - first]
            if self.step.encoder.grid is None:
                cell = self._target(self._base(cell_raw, cell_rows).values, cell_rows)
                self.step.encoder.pack(cell, cell_out)
            else:
                self._quantize(self._base(cell_raw, cell_rows), cell_rows, self.step.encoder.grid, cell_out)

    def finish(self) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        """The parts after the main one, and what survived of the update (None if nothing was quantized)."""
        encoder = self.step.encoder
        if encoder.grid is None:
            return encoder.finish(None, None), None
        scales = torch.cat(self._scales) if self._kept_scales is None else self._kept_scales
        tail = encoder.finish(scales, self.side if self.step.keeps_parts else None)
        if not self.step.updates:
            return tail, None
        effective = encoder.effective_scales(scales) if self._effective is None else self._effective
        base_inner, delta, error = self._sums.tolist()
        inner = float((effective.double() * torch.cat(self._inner).double()).sum())
        return tail, KeptDelta(inner - base_inner, delta, error)

    # -- one cell ------------------------------------------------------------------------------------------

    def _keep(self, scales: Tensor) -> None:
        self._kept_scales = scales
        self._effective = scales if self.step.keeps_parts else self.step.encoder.effective_scales(scales)

    def _split(self, raw: Tensor, rows: range) -> Iterator[tuple[range, Tensor]]:
        offset = self.step.weight.decoder.row_offset
        first = offset(rows.start)
        for cell_rows in cells(rows):
            yield cell_rows, raw[offset(cell_rows.start) - first : offset(cell_rows.stop) - first]

    def _blocks(self, scales: Tensor, rows: range, grid: Grid) -> Tensor:
        """The entries of `scales` that belong to `rows`; a cell starts on a block boundary."""
        columns = self.step.columns
        return scales[rows.start * columns // grid.block : -(-rows.stop * columns // grid.block)]

    def _decode(self, raw: Tensor, rows: range) -> Tensor:
        decoder = self.step.weight.decoder
        scales = self._base_scales
        if scales is not None and decoder.grid is not None:
            scales = self._blocks(scales, rows, decoder.grid)
        out = torch.empty(len(rows), self.step.columns, dtype=torch.float32, device=self.device)
        return decoder.decode(raw, rows, scales, out)

    def _base(self, raw: Tensor, rows: range) -> _Base:
        step, decoder = self.step, self.step.weight.decoder
        if step.merge_base is not None:
            return self._rounded_base(raw, rows)
        values = self._decode(raw, rows)
        if decoder.grid is None or step.encoder.grid is None or self._base_scales is None:
            return _Base(values, values)
        codes = decoder.codes(raw, rows)
        anchor = _scaled(decoder.grid, codes, self._blocks(self._base_scales, rows, decoder.grid))
        kept = None if self._effective is None else self._blocks(self._effective, rows, decoder.grid)
        return _Base(values, anchor.view_as(values), codes, kept)

    def _rounded_base(self, raw: Tensor, rows: range) -> _Base:
        """The base as QLoRA training saw it: rounded to `merge_base` and cast to the weight's dtype."""
        merge_base = self.step.merge_base
        assert merge_base is not None
        assert merge_base.grid is not None
        decoder, grid = self.step.weight.decoder, merge_base.grid
        out = torch.empty(len(rows), self.step.columns, dtype=torch.float32, device=self.device)
        original = decoder.decode(raw, rows, None, out)
        flat = original.flatten()
        codes, absmax = ROUNDINGS["nearest"].choose(flat, grid, Context(None, None, flat, None))
        scales = absmax if self._base_scales is None else self._blocks(self._base_scales, rows, grid)
        kept = scales if self._effective is None else self._blocks(self._effective, rows, grid)
        anchor = _scaled(grid, codes, scales).view_as(original)
        values = anchor.to(self.step.weight.dtype.torch).float()
        error = (original - values).square_().sum(dtype=torch.float64)
        return _Base(values, anchor, codes, kept, error)

    def _target(self, values: Tensor, rows: range) -> Tensor:
        for update, parts, state in zip(self.step.updates, self.parts, self._states, strict=True):
            values = update.apply(values, rows, parts, state)
        self._check_finite(values, rows)
        return values

    def _quantize(self, base: _Base, rows: range, grid: Grid, out: Tensor) -> None:
        step, rounding = self.step, self.step.rounding
        assert rounding is not None
        if not step.updates:
            self._check_finite(base.values, rows)
        if not step.updates and step.keeps_scales and base.codes is not None:
            step.encoder.pack(base.codes, out)  # already on the output's grid: nothing to round
            if self._kept_scales is None and base.effective is not None:
                self._scales.append(base.effective)
            return
        target = self._target(base.values.clone(), rows).flatten()
        delta = target - base.values.flatten()
        noise = None
        if rounding.needs_noise:
            noise = uniform(self.seed, step.name, rows, step.columns, self.device)
        keeps = step.keeps_scales
        context = Context(base.codes if keeps else None, base.effective if keeps else None, delta, noise)
        codes, scales = rounding.choose(target, grid, context)
        step.encoder.pack(codes, out)
        if self._kept_scales is None:
            self._scales.append(scales)
        if step.updates:
            self._inner.append(_block_sums(grid.decode(codes).mul_(delta), grid.block))
            self._sums[0] += (base.anchor.flatten() * delta).sum(dtype=torch.float64)
            self._sums[1] += delta.square().sum(dtype=torch.float64)
            self._sums[2] += base.error

    def _check_finite(self, cell: Tensor, rows: range) -> None:
        """Raise if a value is NaN or infinite. A sum is one fast pass, and finite only if every value is."""
        if bool(torch.isfinite(cell.sum())):
            return
        bad = ~torch.isfinite(cell.view(len(rows), -1))
        if bool(bad.any()):  # else finite values overflowed together, which harms nothing
            row, column = bad.nonzero()[0].tolist()
            raise InputError(
                f"{self.step.name}: the value at row {rows.start + row}, column {column} is "
                f"{cell.view(len(rows), -1)[row, column].item()}, expected a finite number; "
                "look for NaN or infinity in the base and for an adapter that diverged in training"
            )
