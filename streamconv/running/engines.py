"""Engines by device: one for each lane of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from streamconv.planning.devices import Device
from streamconv.planning.plan import Memory
from streamconv.running.cuda import CudaEngine
from streamconv.running.direct import DirectEngine
from streamconv.running.engine import Engine
from streamconv.running.streams import CudaGpu, Gpu
from streamconv.running.workers import Workers


@contextmanager
def open_engines(device: Device, memory: Memory, lanes: int) -> Iterator[Sequence[Engine]]:
    """An engine a lane: on a CPU they share its workers, GPUs take the lanes in turn."""
    if device.is_cpu:
        with Workers(memory.workers) as workers:
            yield [DirectEngine(workers) for _ in range(lanes)]
        return
    names = [device.names[lane % len(device.names)] for lane in range(lanes)]
    with cuda_engines([CudaGpu(name) for name in names], device, memory) as engines:
        yield engines


@contextmanager
def cuda_engines(gpus: Sequence[Gpu], device: Device, memory: Memory) -> Iterator[Sequence[Engine]]:
    """An engine on each of `gpus`, which may be the same one several times."""
    engines = [CudaEngine(gpu, device, memory) for gpu in gpus]
    try:
        yield engines
    finally:  # buffers must not be freed while something is copied to them
        for engine in engines:
            engine.synchronize()
