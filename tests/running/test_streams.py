"""Streams of CUDA, with the calls of torch that they make told by a double."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from streamconv.running.streams import CudaEvent


def test_an_event_is_waited_for_with_its_own_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer's thread has the first device current, on which nothing should come up."""
    current = threading.local()
    seen: list[object] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.device = chosen
        yield
        del current.device

    class Double:
        def synchronize(self) -> None:
            seen.append(getattr(current, "device", None))

    monkeypatch.setattr(torch.cuda, "device", device)
    event = CudaEvent(torch.device("cuda:1"), Double())  # type: ignore[arg-type]  # torch's own wants a driver
    writer = threading.Thread(target=event.synchronize)
    writer.start()
    writer.join()
    assert seen == [torch.device("cuda:1")]
