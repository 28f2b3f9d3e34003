"""Streams of a GPU and the events between them: all that a pipeline over a device needs to ask of it.

What is submitted to a stream is done in order, some time after; streams wait for one another only where an event says
so. A buffer may be overwritten when an event of its last reader has passed, and not before: that rule, which no error
would report, is why there is a seam here. Tests put a device of their own behind it, whose streams run as late or as
early as they may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Event(Protocol):
    """A point in a stream's order."""

    def synchronize(self) -> None:
        """Return when all that was submitted before it is done."""


class DeviceStream(Protocol):
    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done after all that was submitted before. May raise at once, for want of memory above all."""

    def ask(self, work: Callable[[], T]) -> T:
        """Return what `work` answers, which may use results of the device, but waits for nothing that was submitted."""

    def record(self) -> Event:
        """The point that has now been reached in this stream's order."""

    def wait(self, event: Event) -> None:
        """Have all that is submitted from now on done after `event`, of whatever stream."""


class Gpu(Protocol):
    """One device."""

    @property
    def torch(self) -> torch.device: ...

    def stream(self) -> DeviceStream:
        """A new one, that waits for no other by itself."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """A uint8 buffer in host memory which streams can copy from and to without the host's help."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Bring `source` to `target`, of which one is a host buffer; part of what is submitted."""

    def upload(self, host: Tensor) -> Tensor:
        """`host`, from any memory, on the device. It is read before this returns."""

    def give_back(self) -> None:
        """Return memory that nothing uses any more to the device; it may then be had in other sizes."""


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """See Event. Waited for with its own device current: the first one would come up beside it in a writer's thread."""

    device: torch.device
    event: torch.cuda.Event

    def synchronize(self) -> None:
        with torch.cuda.device(self.device):
            self.event.synchronize()


class CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        # torch's own streams do not wait for the default one.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it without types

    def submit(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def ask(self, work: Callable[[], T]) -> T:
        with torch.cuda.stream(self._stream):
            return work()

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # untyped; who waits, sleeps
        event.record(self._stream)
        return CudaEvent(self._device, event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)


class CudaGpu:
    """See Gpu."""

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)

    @property
    def torch(self) -> torch.device:
        return self._device

    def stream(self) -> DeviceStream:
        return CudaStream(self._device)

    def host_buffer(self, nbytes: int) -> Tensor:
        # Pinned through this device: a first one that is not used should not come up.
        with torch.cuda.device(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, host: Tensor) -> Tensor:
        return host.to(self._device)

    def give_back(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()
