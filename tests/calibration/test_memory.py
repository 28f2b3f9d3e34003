"""What is freed between layers goes back to the system."""

from __future__ import annotations

import torch

from streamconv.calibration.passes import release_freed_memory
from streamconv.planning.devices import Device
from streamconv.progress import anonymous_bytes


def test_freed_memory_is_given_back_from_between_what_is_kept() -> None:
    """Pieces too small to be mapped one by one, and every hundredth stays: the heap cannot shrink from its end."""
    pieces = [torch.zeros(16_384) for _ in range(3200)]  # 210 MB
    kept = pieces[::100]
    full = anonymous_bytes()
    del pieces
    release_freed_memory(Device("cpu", "CPU"))
    assert len(kept) == 32
    assert anonymous_bytes() < full - 150e6
