"""First entries of `torch.randperm` without the rest: of a large weight's places it fills gigabytes, of which a method
that draws places from a seed needs a thousand numbers.

`randperm_cpu` of `aten/src/ATen/native/TensorFactories.cpp` shuffles in one of two ways (Fisher and Yates). Short ones
exchange entry i with a later one, i + (32 random bits mod n - i), so the first k are known after k steps. Long ones
insert i at place z of those before it, z = 64 random bits mod i + 1, and move what was there to the end: all steps
count, but of these only the ones whose z is among the first k.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

# Entries from which on torch takes the second way.
LONG = (2**32 - 1) // 20
# Random numbers at a time.
CHUNK = 1 << 16
HELD_BYTES = 64 * CHUNK
"""Bytes held while numbers are drawn, whatever the length."""


@lru_cache(maxsize=256)
def first_of_permutation(length: int, count: int, seed: int) -> tuple[int, ...]:
    """`torch.randperm(length)[:count]` with a CPU generator of this seed; layers of one shape share it."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = min(count, length)
    return _exchanged(length, count, generator) if length < LONG else _inserted(length, count, generator)


def _exchanged(length: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    moved: dict[int, int] = {}
    found = []
    steps = min(count, length - 1)
    # 64 random bits are two times 32, the first of them above.
    numbers = _random64((steps + 1) // 2, generator)
    halves = np.stack([numbers >> np.uint64(32), numbers & np.uint64(2**32 - 1)], axis=1).ravel().tolist()
    for step, number in zip(range(steps), halves, strict=False):
        other = step + number % (length - step)
        found.append(moved.get(other, other))
        moved[other] = moved.get(step, step)
    return (*found, moved.get(steps, steps)) if steps < count else tuple(found)


def _inserted(length: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    found = [0] * count
    for start in range(0, length, CHUNK):
        numbers = _random64(min(CHUNK, length - start), generator)
        places = numbers % np.arange(start + 1, start + 1 + len(numbers), dtype=np.uint64)
        for step in np.flatnonzero(places < count).tolist():
            place, entry = int(places[step]), start + step
            if entry < count:
                found[entry] = found[place]
            found[place] = entry
    return tuple(found)


def _random64(count: int, generator: torch.Generator) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    drawn = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return drawn.numpy().view(np.uint64)
