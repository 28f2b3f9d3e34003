"""What is freed between layers goes back to the system."""

from __future__ import annotations

from pathlib import Path

import torch

from streamconv.calibration.walk import release_freed_memory


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_freed_memory_is_given_back_from_between_what_is_kept() -> None:
    """Pieces too small to be mapped one by one, and every hundredth stays: the heap cannot shrink from its end."""
    pieces = [torch.zeros(16_384) for _ in range(3200)]  # 210 MB
    kept = pieces[::100]
    full = anonymous_bytes()
    del pieces
    release_freed_memory()
    assert len(kept) == 32
    assert anonymous_bytes() < full - 150e6
