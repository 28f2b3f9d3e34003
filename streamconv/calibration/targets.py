"""Float32 targets of a plan's weights, and of those that are calibrated, what they are made of, until it is let go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import Shape
from streamconv.formats.rows import StoredRows, in_file_order
from streamconv.forward.weights import WeightSource
from streamconv.planning.devices import Device
from streamconv.planning.plan import Plan, Rewrite, cell_rows
from streamconv.planning.scales import scales_of_base
from streamconv.rounding.feedback import BaseOnGrid, QuantizedWeight
from streamconv.running.cell import KeptDelta
from streamconv.running.cells import WeightWork
from streamconv.running.direct import DirectEngine
from streamconv.running.opened import open_weight
from streamconv.running.scales import Fixed, Kept
from streamconv.running.workers import Workers


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A weight that has been read: its bytes in row form (uint8, flat, in host memory), and the work on it."""

    work: WeightWork
    raw: Tensor

    @property
    def step(self) -> Rewrite:
        return self.work.step

    @property
    def _rows(self) -> range:
        return range(self.step.rows)

    def target(self) -> Tensor:
        """Float32 [out, in], on the device."""
        out = torch.empty(self.step.rows, self.step.columns, device=self.work.device)
        self.work.targets(self._on_device(), self._rows, out)
        return out

    def base(self) -> BaseOnGrid | None:
        """Codes and scales of the base where it lies on the output's grid."""
        if not isinstance(self.work.scales, Kept) and self.work.overwrites is None:
            return None
        codes = torch.empty(self.step.rows * self.step.columns, dtype=torch.uint8, device=self.work.device)
        self.work.base_codes(self._on_device(), self._rows, codes)
        return BaseOnGrid(codes, self.work.effective_scales())

    def difference(self, target: Tensor) -> Tensor:
        """Change that the update makes, `target` less the base, float32 [out, in]."""
        out = torch.empty_like(target)
        self.work.bases(self._on_device(), self._rows, out)
        return torch.sub(target, out, out=out)

    def packed(self, chosen: QuantizedWeight) -> tuple[tuple[bytes, ...], KeptDelta | None]:
        """Bytes of all parts with these codes, in the encoder's order, and what survives of the update."""
        self.work.use(self._scales(chosen), chosen.codes)
        size = self.step.encoder.row_offset(self.step.rows)
        out = torch.empty(size, dtype=torch.uint8, device=self.work.device)
        self.work.rewrite(self._on_device(), self._rows, out).wait()
        tail, kept = self.work.finish()
        stored = in_file_order(self.step.encoder.order, out.cpu())
        return (bytes(tensor_bytes(stored)), *tail), kept

    def _scales(self, chosen: QuantizedWeight) -> Kept | Fixed:
        if chosen.keeps_base and isinstance(self.work.scales, Kept):
            return self.work.scales
        if chosen.keeps_base and self.work.overwrites is not None:
            return Kept(chosen.scales, chosen.scales, None)
        return Fixed(chosen.scales, self.step.encoder.effective_scales(chosen.scales))

    def _on_device(self) -> Tensor:
        return self.raw.to(self.work.device)


class Targets:
    """See Weights; use as a context manager. Weights that `plan` calibrates are held once they have been read.

    `reference` is the plan of the same targets as dense float32 weights, from which all others come.
    """

    def __init__(self, plan: Plan, reference: Plan) -> None:
        self.held: dict[str, Held] = {}
        self.steps: Mapping[str, Rewrite] = {step.name: _with_base_scales(step) for step in plan.calibrated}
        self._device: Device = plan.device
        self._seed = plan.options.seed
        self._dense = WeightSource(reference, plan.device, lambda _: None)
        self._reader = TensorReader()
        self._workers = Workers(max(1, reference.memory.workers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.held.clear()
        self._reader.close()
        self._workers.__exit__(*exc)
        self._dense.__exit__(*exc)

    @property
    def names(self) -> Sequence[str]:
        return self._dense.names

    def shape(self, name: str) -> Shape:
        return self._dense.shape(name)

    def nbytes(self, name: str) -> int:
        return self._dense.nbytes(name)

    def stored_bytes(self, name: str) -> int:
        return self._dense.stored_bytes(name)

    def tiles(self, name: str, height: int) -> Iterator[tuple[range, Tensor]]:
        return self._dense.tiles(name, height)

    def check_unchanged(self) -> None:
        self._dense.check_unchanged()
        self._reader.check_recent()

    def read(self, name: str) -> Tensor:
        step = self.steps.get(name)
        if step is None:
            return self._dense.read(name)
        held = self.held[name] = self._hold(step)
        return held.target()

    def _hold(self, step: Rewrite) -> Held:
        rows, device = range(step.rows), self._device.torch
        raw = torch.empty(step.weight.decoder.row_offset(step.rows), dtype=torch.uint8)
        StoredRows(self._reader, step.weight).read_into(rows, raw)
        engine = DirectEngine(self._workers, device, cell_rows(self._device, step))
        whole = ((rows, each.to(device)) for each in (raw,))
        opened = open_weight(self._reader, [step], engine, whole, self._seed)
        return Held(opened.works[0], raw)


def _with_base_scales(step: Rewrite) -> Rewrite:
    """`step` as it is read here: the base's scales may stay, where it lies on the output's grid."""
    scales = scales_of_base(step.weight, step.merge_base, step.encoder, step.equalizer)
    # How the rest of the plan is rounded is of no use here: codes are chosen for all of a weight.
    return replace(step, rounding=None, scales=scales, calibrated=False)
