"""The pretend GPU behind the seam of streams, and how the package is made to see it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from streamconv.planning import plan as plans
from streamconv.planning.devices import Device
from streamconv.running.streams import Event
from tests.pretend.device import CUDA, PINNED, install
from tests.pretend.ledger import HERE, HOST, LEDGER
from tests.running.fake_gpu import EAGER, FakeEvent, FakeGpu, FakeStream

T = TypeVar("T")
DEVICE = Device("cuda:0", "pretend GPU")
# Modules that resolve a device by its name.
_RESOLVING = (
    "streamconv.evaluation.scoring",
    "streamconv.extraction.checkpoints",
    "streamconv.pipeline.preparation",
    "streamconv.comparison.running",
    "tests.forward.walking",
)


@dataclass(eq=False)
class PretendEvent(FakeEvent):
    at: int = 0

    def synchronize(self) -> None:
        super().synchronize()
        assert isinstance(self.stream, PretendStream)
        LEDGER.waits_for(HOST, self.stream.label, self.at)


class PretendStream(FakeStream):
    label = ""
    """Its name, told from those of other engines' streams."""

    def submit(self, work: Callable[[], None]) -> None:
        super().submit(lambda: self._do(work, is_submitted=True))

    def ask(self, work: Callable[[], T]) -> T:
        return self._do(work, is_submitted=False)

    def record(self) -> Event:
        event = PretendEvent(self)
        self._append(event)
        event.at = LEDGER.clock
        return event

    def wait(self, event: Event) -> None:
        super().wait(event)
        assert isinstance(event, PretendEvent)
        assert isinstance(event.stream, PretendStream)
        LEDGER.waits_for(self.label, event.stream.label, event.at)

    def _do(self, work: Callable[[], T], *, is_submitted: bool) -> T:
        before = HERE.stream, HERE.is_submitted
        HERE.stream, HERE.is_submitted = self.label, is_submitted
        try:
            return work()
        finally:
            HERE.stream, HERE.is_submitted = before


_numbers = itertools.count(1)


class PretendGpu(FakeGpu):
    def stream(self) -> PretendStream:
        made = PretendStream(self, next(self._names))
        made.label = f"{made.name} {next(_numbers)}"
        self.streams.append(made)
        return made

    def host_buffer(self, nbytes: int) -> Tensor:
        made = super().host_buffer(nbytes)
        PINNED[made.data_ptr()] = max(1, nbytes)
        weakref.finalize(made, PINNED.pop, made.data_ptr(), None)  # other memory may come to lie there
        return made

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, host: Tensor) -> Tensor:
        return host.to(CUDA)


@contextmanager
def pretend_gpu(*, cells_of: int = 1, everywhere: bool = False) -> Iterator[None]:
    """Have the package see one GPU, `cuda`; cells have about `cells_of` elements there, 64 rows at least.

    `everywhere`: whatever device is named, cpu as well.
    """
    import importlib

    install()

    def resolve(name: str) -> Device:
        if name == "cpu" and not everywhere:
            return Device("cpu", f"CPU {torch.backends.cpu.get_cpu_capability()}")
        return DEVICE

    modules = [
        module for module in map(importlib.import_module, _RESOLVING) if hasattr(module, "resolve_device")
    ]
    patches: list[Any] = [mock.patch.object(module, "resolve_device", resolve) for module in modules]
    patches.append(mock.patch.object(plans, "GPU_CELL_ELEMENTS", cells_of))
    # Kernels of a compiler for GPUs cannot run here; the bytes of both must be the same.
    patches.append(
        mock.patch.object(importlib.import_module("streamconv.kernels"), "fused_kernels", return_value=None)
    )
    engines = importlib.import_module("streamconv.running.engines")
    patches.append(mock.patch.object(engines, "CudaGpu", lambda name: PretendGpu(name, EAGER, torch=CUDA)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
