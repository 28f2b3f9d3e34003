"""Random numbers that depend on nothing but seed, tensor name and place: SplitMix64, counted.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014): the n-th output of a
stream is `mix(key + n * 0x9E3779B97F4A7C15)` modulo 2⁶⁴, so any stretch can be made on its own. Every 64 rows
of a weight have a stream of their own, whose key is a BLAKE2b hash of seed, name and place; each 64-bit
output gives two numbers. Integer arithmetic throughout: the same bits on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROWS_PER_KEY = 64


def uniform(seed: int, name: str, rows: range, columns: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), multiples of 2⁻²⁴, for `rows` of the weight `name`: float32, flat, row by row."""
    out = torch.empty(len(rows) * columns, dtype=torch.float32, device=device)
    row = rows.start
    while row < rows.stop:
        group = row // ROWS_PER_KEY
        end = min(rows.stop, (group + 1) * ROWS_PER_KEY)
        base = group * ROWS_PER_KEY
        start, stop = ((place - base) * columns for place in (row, end))
        numbers = _stretch(_key(seed, name, group), start, stop, device)
        out[(row - rows.start) * columns : (end - rows.start) * columns] = numbers
        row = end
    return out


def _key(seed: int, name: str, group: int) -> int:
    digest = hashlib.blake2b(f"{seed} {group} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _signed(word: int) -> int:
    """A 64-bit pattern as torch's int64 has it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def _stretch(key: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Numbers `start` to `stop` of the stream `key`."""
    first = start // 2
    words = torch.arange(first, (stop + 1) // 2, dtype=torch.int64, device=device)
    words.mul_(_GAMMA).add_(key)
    shifted = torch.empty_like(words)
    for shift, factor in _MIX:
        # torch shifts in copies of the sign; the mask makes it the logical shift of the paper.
        torch.bitwise_right_shift(words, shift, out=shifted).bitwise_and_((1 << (64 - shift)) - 1)
        words.bitwise_xor_(shifted)
        if factor != 1:
            words.mul_(factor)
    halves = words.view(torch.int32).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return halves[start - 2 * first : stop - 2 * first].to(torch.float32).mul_(2.0**-24)
