"""Random numbers that depend on nothing but seed, tensor name and place: SplitMix64, counted.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014): the n-th output of a
stream is `mix(key + n * 0x9E3779B97F4A7C15)` modulo 2⁶⁴, so any stretch can be made on its own. Every 64 rows
of a weight have a stream of their own, whose key is a BLAKE2b hash of seed, name and place; each 64-bit
output gives two numbers. Integer arithmetic throughout: the same bits on every device.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.in_torch import uniform_streams

ROWS_PER_KEY = 64


def uniform(seed: int, name: str, rows: range, columns: int, out: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2⁻²⁴, for `rows` of the weight `name`, in `out`: float32, flat, row by row."""
    if not out.is_cpu and rows.start % ROWS_PER_KEY == 0:
        groups = range(rows.start // ROWS_PER_KEY, -(-rows.stop // ROWS_PER_KEY))
        uniform_streams([_key(seed, name, group) for group in groups], ROWS_PER_KEY * columns, out)
        return out
    kernels = kernels_for(out.device)
    row = rows.start
    while row < rows.stop:
        group = row // ROWS_PER_KEY
        end = min(rows.stop, (group + 1) * ROWS_PER_KEY)
        first = (row - group * ROWS_PER_KEY) * columns
        kernels.uniform(
            _key(seed, name, group), first, out[(row - rows.start) * columns : (end - rows.start) * columns]
        )
        row = end
    return out


def _key(seed: int, name: str, group: int) -> int:
    digest = hashlib.blake2b(f"{seed} {group} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
