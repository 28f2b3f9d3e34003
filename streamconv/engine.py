"""Where tiles are computed: the seam between the executor and a device. The maths is `cells`', whatever the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from streamconv.cells import Ticket, WeightWork, Workers
from streamconv.devices import Device
from streamconv.plan import Memory, Rewrite


class Engine(Protocol):
    """Computes tiles in the order given; use as a context manager. All calls come from one thread."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def host_buffer(self, nbytes: int) -> Tensor:
        """A uint8 buffer in host memory that the engine can take tiles from and leave results in."""

    def begin(
        self, step: Rewrite, side: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], seed: int
    ) -> WeightWork:
        """The work on one weight; `side` and `parts` as they were read, in host memory."""

    def reduce(self, raw: Tensor, rows: range, works: Sequence[WeightWork]) -> None:
        """First pass over a tile whose bytes are `raw`, a part of a host buffer; done when this returns."""

    def rewrite(self, raw: Tensor, rows: range, works: Sequence[tuple[WeightWork, Tensor]]) -> Ticket:
        """Second pass: each work's bytes for `rows` go to the host buffer beside it, some time before the ticket."""


class _All:
    """Several tickets in one."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    def wait(self) -> None:
        for ticket in self._tickets:
            ticket.wait()


class CpuEngine:
    """Tiles are computed where they lie, by threads that share their cells."""

    def __init__(self, workers: int) -> None:
        self._workers = Workers(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._workers.__exit__(*exc)

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(
        self, step: Rewrite, side: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], seed: int
    ) -> WeightWork:
        return WeightWork(step, side, parts, torch.device("cpu"), seed, self._workers)

    def reduce(self, raw: Tensor, rows: range, works: Sequence[WeightWork]) -> None:
        for work in works:
            work.reduce(raw, rows)

    def rewrite(self, raw: Tensor, rows: range, works: Sequence[tuple[WeightWork, Tensor]]) -> Ticket:
        return _All([work.rewrite(raw, rows, out) for work, out in works])


class _Done:
    """Nothing to wait for."""

    def wait(self) -> None:
        pass


class CudaEngine:
    """Tiles are brought to a GPU and back, one after the other."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._workers = Workers(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._workers.__exit__(*exc)

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin(
        self, step: Rewrite, side: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], seed: int
    ) -> WeightWork:
        device = self._device.torch
        on_device = [{role: part.to(device) for role, part in update.items()} for update in parts]
        there = {role: part.to(device) for role, part in side.items()}
        return WeightWork(step, there, on_device, device, seed, self._workers)

    def reduce(self, raw: Tensor, rows: range, works: Sequence[WeightWork]) -> None:
        there = raw.to(self._device.torch)
        for work in works:
            work.reduce(there, rows)

    def rewrite(self, raw: Tensor, rows: range, works: Sequence[tuple[WeightWork, Tensor]]) -> Ticket:
        there = raw.to(self._device.torch)
        for work, out in works:
            computed = torch.empty_like(out, device=self._device.torch)
            work.rewrite(there, rows, computed).wait()
            out.copy_(computed)
        return _Done()


def open_engine(device: Device, memory: Memory) -> Engine:
    return CpuEngine(memory.workers) if device.is_cpu else CudaEngine(device)
