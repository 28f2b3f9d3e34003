"""Faults for the pretend GPU to see: what it noted of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tests.pretend.device import CUDA, PINNED, MixedDevicesError, unknown_to_cuda
from tests.pretend.gpu import PretendGpu
from tests.pretend.ledger import LEDGER


def _waits(work: Callable[[], object]) -> int:
    LEDGER.reset()
    work()
    return sum(LEDGER.waits.values())


def _freed_elsewhere(*, is_waited_for: bool) -> int:
    """How often memory was freed that another stream was still to work on."""
    LEDGER.reset()
    gpu = PretendGpu()
    one, other = gpu.stream(), gpu.stream()
    made = [one.ask(partial(torch.empty, 1000, device=CUDA))]
    other.submit(lambda: made[0].mul_(2))  # type: ignore[arg-type]  # of what is submitted, nothing is answered
    if is_waited_for:
        one.wait(other.record())
    made.clear()
    return sum(LEDGER.crossed.values())


def seen() -> Mapping[str, Any]:
    """What was noted, where CUDA is pretended."""
    found: dict[str, Any] = {}
    there, host, pinned = torch.ones(4, device=CUDA), torch.ones(4), torch.ones(4)
    try:
        there.add_(host)
        found["mix refused"] = False
    except MixedDevicesError:
        found["mix refused"] = True

    PINNED[pinned.data_ptr()] = 16
    found["waits of item, mask, number set, pageable copy"] = [
        _waits(there.sum().item),
        _waits(partial(there.__getitem__, there > 2)),
        _waits(partial(there.__setitem__, 1, 5.0)),
        _waits(partial(there.copy_, host, non_blocking=True)),
    ]
    found["pinned copies wait"] = _waits(partial(there.copy_, pinned, non_blocking=True))
    LEDGER.reset()
    there.div_(3)
    threes = sum(LEDGER.reciprocals.values())
    there.div_(4)
    found["divisions by 3, by 4"] = [threes, sum(LEDGER.reciprocals.values()) - threes]
    del there
    gc.collect()
    LEDGER.reset()
    before = LEDGER.now  # tables that stay
    large = torch.empty(1000, device=CUDA)
    found["bytes of 1000 floats"] = LEDGER.now - before
    del large
    found["freed after use on another stream, waited for and not"] = [
        _freed_elsewhere(is_waited_for=True),
        _freed_elsewhere(is_waited_for=False),
    ]
    gc.collect()
    found["bytes after"] = LEDGER.now - before
    return found


def without_kernel() -> list[tuple[str, str]]:
    """Which of two operations CUDA has no kernel for."""
    return unknown_to_cuda([("lgamma", "torch.bool"), ("bitwise_and", "torch.float32")])
