"""Budget of an evaluation: how much is done at a time within --max-ram and --max-vram, and the least it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from streamconv.errors import ResourceError
from streamconv.forward.memory import BATCH_TOKENS, FIXED_BYTES, sequence_bytes, table_bytes
from streamconv.forward.walk import Walk
from streamconv.planning.options import MergeOptions

# Logits of a tile of the vocabulary, their exponentials, what is gathered of them; as much again for a reference.
_LOGIT_COPIES = 8
_LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Budget:
    """`batch` sequences at a time, `height` rows of the head, `states` bytes of activations in memory; `ram` in all."""

    batch: int
    height: int
    states: int
    ram: int


def plan_budget(walks: Sequence[Walk], windows: Tensor, options: MergeOptions) -> Budget:
    """Raises ResourceError if not even one sequence at a time fits."""
    count, length = windows.shape
    fixed = FIXED_BYTES if walks[0].device.is_cpu else 0
    limit = options.max_ram_bytes if walks[0].device.is_cpu else options.max_vram_bytes
    option = "--max-ram" if walks[0].device.is_cpu else "--max-vram"
    layer = max(walk.largest_layer_bytes + table_bytes(walk, windows.numel()) for walk in walks)
    sequence = max(sequence_bytes(walk, length) for walk in walks)
    least = fixed + layer + sequence
    if least > limit:
        raise ResourceError(
            f"{option} is too small to evaluate this model: a layer and one sequence of {length} tokens need "
            f"{math.ceil(least / 2**20)}MiB; allow that much, or give a shorter --sequence-length or --dtype bfloat16"
        )
    batch = max(1, min(count, BATCH_TOKENS // length, (limit - fixed - layer) // (2 * sequence)))
    working = layer + batch * sequence
    height = min(_LOGIT_BYTES, working) // (_LOGIT_COPIES * 4 * batch * length)
    states = (
        max(0, limit - fixed - working) if walks[0].device.is_cpu else options.max_ram_bytes - FIXED_BYTES
    )
    return Budget(
        batch,
        max(64, height),
        states // len(walks),
        fixed + working + min(states, _all_states(walks, windows)),
    )


def _all_states(walks: Sequence[Walk], windows: Tensor) -> int:
    return sum(windows.numel() * walk.hidden * walk.dtype.itemsize for walk in walks)
