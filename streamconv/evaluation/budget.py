"""Budget of an evaluation: how much is done at a time within --max-ram and --max-vram, and the least it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from streamconv.errors import ResourceError
from streamconv.forward.memory import BATCH_TOKENS, FIXED_BYTES, sequence_bytes, table_bytes
from streamconv.forward.walk import Walk
from streamconv.forward.weights import HOST_BYTES
from streamconv.planning.memory import FIXED_VRAM_BYTES
from streamconv.planning.options import MergeOptions

# Logits of a tile of the vocabulary, their exponentials, what is gathered of them; as much again for a reference.
_LOGIT_COPIES = 8
_LOGIT_BYTES = 256 * 2**20
# Sums of a predicted token, of a model and its reference: see `measures`.
_TALLY_BYTES = 2 * 40


@dataclass(frozen=True, slots=True)
class Budget:
    """`batch` sequences at a time, `height` rows of the head, `states` bytes of activations in memory for each model.

    `ram` and `vram` are bytes in all, `vram` 0 on a CPU.
    """

    batch: int
    height: int
    states: int
    ram: int
    vram: int = 0


def plan_budget(walks: Sequence[Walk], windows: Tensor, options: MergeOptions, cells: int = 0) -> Budget:
    """Raises ResourceError if not even one sequence at a time fits.

    `cells` are bytes that the work on a weight's cells takes on a GPU, while a layer is put together; on a CPU they are
    among the fixed ones.
    """
    is_cpu = walks[0].device.is_cpu
    if is_cpu:
        fixed, limit, option = FIXED_BYTES, options.max_ram_bytes, "--max-ram"
    else:
        fixed = FIXED_VRAM_BYTES + _TALLY_BYTES * windows.numel()
        limit, option = options.max_vram_bytes, "--max-vram"
    count, length = windows.shape
    layer = max(walk.largest_layer_bytes + table_bytes(walk, windows.numel()) for walk in walks)
    sequence = max(sequence_bytes(walk, length) for walk in walks)
    _check(option, limit, fixed + layer + max(cells, sequence), length)
    batch = max(1, min(count, BATCH_TOKENS // length, (limit - fixed - layer) // (2 * sequence)))
    working = layer + max(cells, batch * sequence)
    height = max(64, min(_LOGIT_BYTES, working) // (_LOGIT_COPIES * 4 * batch * length))
    if is_cpu:
        states = max(0, limit - fixed - working)
        return Budget(
            batch, height, states // len(walks), fixed + working + min(states, _all_states(walks, windows))
        )
    on_host = FIXED_BYTES + HOST_BYTES + max(batch * length * walk.hidden * 4 for walk in walks)
    _check("--max-ram", options.max_ram_bytes, on_host, length)
    states = options.max_ram_bytes - on_host
    ram = on_host + min(states, _all_states(walks, windows))
    return Budget(batch, height, states // len(walks), ram, fixed + working)


def _check(option: str, limit: int, least: int, length: int) -> None:
    if least > limit:
        raise ResourceError(
            f"{option} is too small to evaluate this model: a layer and one sequence of {length} tokens need "
            f"{math.ceil(least / 2**20)}MiB; allow that much, or give a shorter --sequence-length or --dtype bfloat16"
        )


def _all_states(walks: Sequence[Walk], windows: Tensor) -> int:
    return sum(windows.numel() * walk.hidden * walk.dtype.itemsize for walk in walks)
