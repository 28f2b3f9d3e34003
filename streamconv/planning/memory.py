"""Memory that a run needs at most, from its steps alone, and the size its tiles may have within a budget."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamconv.errors import ResourceError
from streamconv.formats.base import Order
from streamconv.planning.devices import Device
from streamconv.planning.gpu_memory import block_bytes, host_block_bytes, numbers, tile_sizes, work_bytes
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import (
    DEVICE_TILES,
    SLOTS,
    WEIGHTS_HELD,
    Memory,
    Rewrite,
    SideParts,
    Step,
    cell_rows,
)
from streamconv.sizes import power_of_two

# What the process needs beside the planned buffers: libraries loaded late, thread stacks, headers, messages, 256 KiB a
# shard in which blocks are gathered, a page a buffer; and once on every machine, to compile the kernels, 70 MiB.
FIXED_BYTES = 96 * 2**20
# Larger tiles gain nothing: 8 MiB is read, hashed and written at full speed.
MAX_BUFFER_BYTES = 8 * 2**20
MIN_BUFFER_BYTES = 64 * 2**10
# Beyond this, reading, hashing and writing bind.
MAX_WORKERS = 16
# A lane reads, hashes and writes in a thread each, and one of these is a core's work at 1 to 2 GB/s.
CORES_A_LANE = 4
MAX_LANES = 4
# On a GPU, a lane's libraries want some for themselves: cuBLAS takes up to 32 MiB for every stream it works on.
FIXED_VRAM_BYTES = 64 * 2**20
# float32 tensors of one cell alive at once: decoded and packed; or base, target, delta, noise, indices, codes.
_DENSE_CELL_COPIES = 3
_GRID_CELL_COPIES = 16
# Per block of a quantized weight: scales as read, chosen, effective and written, the kept-delta product, and what
# nesting scales takes on the way. Measured for nf4-dq onto nf4-dq, which needs most: 42.5.
_BYTES_PER_BLOCK = 44
_BYTES_PER_READ_BLOCK = 12


def plan_memory(
    steps: Sequence[Step],
    options: MergeOptions,
    device: Device,
    shards: int = 1,
    further: Sequence[Sequence[Step]] = (),
    beside: int = 0,
    watched: bool = False,
) -> Memory:
    """Tile buffer, workers, lanes and peaks for `steps`, which end in so many shards, and those of `further` outputs.

    `beside`: bytes that the caller holds where cells are computed, once a lane. `watched`: it looks at each of them.

    Raises ResourceError if the least they need is over a budget.
    """
    outputs = 1 + len(further)
    each = [[step for step in some if isinstance(step, Rewrite)] for some in (steps, *further)]
    weights = [step for some in each for step in some]
    # A worker has one cell in work, and for each output a place to decode it to.
    decoded = (outputs - 1) * max((_dense_cell_bytes(step, device) for step in weights), default=0)
    need = _Need(
        outputs=outputs,
        held=max((_held_bytes(step) for step in weights), default=0),
        blocks=_sum_of_greatest(each, _block_bytes if device.is_cpu else host_block_bytes),
        blocks_there=0 if device.is_cpu else _sum_of_greatest(each, block_bytes),
        prepared=_sum_of_greatest(each, lambda step: step.prepared_bytes),
        whole=_sum_of_greatest(each, lambda step: step.whole_bytes),
        solver=0 if device.is_cpu else max((step.solver_bytes for step in weights), default=0),
        forms=_form_bytes(each, device),
        waiting=sum(_waiting_bytes(some) for some in (steps, *further)),
        cell=max((_work_bytes(step, device, watched) for step in weights), default=0) + decoded,
        least=max([MIN_BUFFER_BYTES, *(max(_cell_bytes(step), _line_bytes(step)) for step in weights)]),
        beside=beside,
    )
    if device.is_cpu:
        return _on_cpu(need, options, shards)
    return _on_gpus(
        need, tile_sizes(weights, device, MAX_BUFFER_BYTES, MIN_BUFFER_BYTES), options, shards, device
    )


def _sum_of_greatest(outputs: Sequence[Sequence[Rewrite]], size: Callable[[Rewrite], int]) -> int:
    """Sum over `outputs` of the greatest `size` of a step of each."""
    return sum(max(map(size, steps), default=0) for steps in outputs)


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes that the largest weight of a run needs: its side parts and adapter, what is kept for its blocks, in host
    memory and on a GPU, prepared of the adapter, and kept of the whole of it, with a solver's workspace there, main
    parts that files hold in another order than by rows, side parts of all experts of a layer that wait for their place,
    one cell in work, and a buffer for one stored cell, the least that a tile can be on a CPU; and what its caller holds
    beside.
    """

    outputs: int
    held: int
    blocks: int
    blocks_there: int
    prepared: int
    whole: int
    solver: int
    forms: int
    waiting: int
    cell: int
    least: int
    beside: int

    @property
    def buffers(self) -> int:
        """Number of buffers for a tile: one read, and one written for each output."""
        return 1 + self.outputs


def _on_cpu(need: _Need, options: MergeOptions, shards: int) -> Memory:
    cores = len(os.sched_getaffinity(0))
    computed = need.blocks + need.prepared + need.whole + need.forms + need.waiting + need.beside
    lane = WEIGHTS_HELD * need.held + computed
    buffers = SLOTS * need.buffers
    lanes = _lanes(lane + buffers * max(need.least, MAX_BUFFER_BYTES), options, shards, cores)
    fixed = FIXED_BYTES + lanes * lane
    # Half of what is left goes to the workers' cells, as far as there are cores to use it.
    spare = (options.max_ram_bytes - fixed - lanes * buffers * need.least) // 2
    workers = max(1, min(cores, MAX_WORKERS, spare // max(need.cell, 1)))
    buffer = _fit(
        options.max_ram_bytes, fixed + workers * need.cell, need.least, lanes * buffers, "--max-ram"
    )
    return Memory(fixed + workers * need.cell + lanes * buffers * buffer, 0, buffer, workers, lanes)


def _on_gpus(
    need: _Need, sizes: Sequence[tuple[int, int]], options: MergeOptions, shards: int, device: Device
) -> Memory:
    """Memory where GPUs compute: each has a lane at least, where there are shards and memory for it.

    `sizes` are buffers for a tile as it is read and as it is written, from the largest on.
    """
    gpus = len(device.names)
    in_ram = WEIGHTS_HELD * need.held + need.blocks + need.forms + need.waiting
    in_vram = (
        FIXED_VRAM_BYTES
        + need.outputs * need.held
        + need.blocks_there
        + need.prepared
        + max(need.whole + need.solver, need.whole + need.cell)
        + need.beside
    )

    def memory(lanes: int, size: tuple[int, int]) -> Memory:
        read, written = size
        tile = read + need.outputs * written
        return Memory(
            ram=FIXED_BYTES + lanes * (in_ram + SLOTS * tile),
            vram=-(-lanes // gpus) * (in_vram + DEVICE_TILES * tile),
            buffer=read,
            workers=1,
            lanes=lanes,
            written=written,
        )

    def fits(found: Memory) -> bool:
        return found.ram <= options.max_ram_bytes and found.vram <= options.max_vram_bytes

    cores = len(os.sched_getaffinity(0))
    wanted = max(1, min(shards, max(min(cores // CORES_A_LANE, MAX_LANES), gpus)))
    # Lanes before large buffers, which gain little: one lane hashes and submits slower than a GPU computes.
    for lanes in range(wanted, 0, -1):
        for size in sizes:
            if fits(memory(lanes, size)):
                return memory(lanes, size)
    raise _too_small(memory(1, sizes[-1]), options)


def _too_small(least: Memory, options: MergeOptions) -> ResourceError:
    is_ram = least.ram > options.max_ram_bytes
    option, nbytes = ("--max-ram", least.ram) if is_ram else ("--max-vram", least.vram)
    return ResourceError(
        f"{option} is too small for this model: its largest weight needs at least {math.ceil(nbytes / 2**20)}MiB; "
        "allow that much"
    )


def _lanes(lane: int, options: MergeOptions, shards: int, cores: int) -> int:
    """Number of lanes of so many bytes that there are shards and cores for, and memory with half of it to spare."""
    return max(1, min(shards, cores // CORES_A_LANE, MAX_LANES, options.max_ram_bytes // 2 // lane))


def _fit(budget: int, fixed: int, least: int, buffers: int, option: str) -> int:
    """The largest buffer of which so many fit `budget`, or that anything gains from."""
    buffer = min((budget - fixed) // buffers, max(least, MAX_BUFFER_BYTES))
    if buffer < least:
        raise ResourceError(
            f"{option} is too small for this model: its largest weight needs at least "
            f"{math.ceil((fixed + buffers * least) / 2**20)}MiB; allow that much"
        )
    return buffer


def _cell_bytes(step: Rewrite) -> int:
    """Bytes of one cell of a CPU in storage, read or written, whichever is more."""
    rows = min(step.encoder.cell_rows, step.rows)
    return max(step.weight.decoder.row_offset(rows), step.encoder.row_offset(rows))


def _line_bytes(step: Rewrite) -> int:
    """Bytes of the longest line, where a file holds a main part in these."""
    orders = (step.weight.decoder.order, step.encoder.order)
    return max((order.line_bytes for order in orders if order is not None), default=0)


def _form_bytes(outputs: Sequence[Sequence[Rewrite]], device: Device) -> int:
    """Bytes of row forms that are held whole: of one weight as it is read, and one as it is written to each output."""

    def size(order: Order | None) -> int:
        nbytes = order.lines * order.line_bytes if order is not None else 0
        # Memory that a GPU copies to is allocated in powers of two.
        return nbytes if device.is_cpu or not nbytes else power_of_two(nbytes)

    def written_size(step: Rewrite) -> int:
        # A file may have some lines only of what is held.
        held = step.encoder.row_offset(step.rows) if step.encoder.order is not None else 0
        return max(size(step.encoder.order), held)

    read = max((size(step.weight.decoder.order) for steps in outputs for step in steps), default=0)
    written = (max(map(written_size, steps), default=0) for steps in outputs)
    return read + sum(written)


def _waiting_bytes(steps: Sequence[Step]) -> int:
    """Bytes of side parts that wait for those of the last weight in their stack, of the largest stack."""
    stacks: dict[tuple[str, ...], int] = {}
    for step in steps:
        if isinstance(step, SideParts):
            stacks[step.weights] = stacks.get(step.weights, 0) + step.spec.nbytes
    return max(stacks.values(), default=0)


def _quantizes(step: Rewrite) -> bool:
    return step.encoder.grid is not None or step.merge_base is not None


def _work_bytes(step: Rewrite, device: Device, watched: bool) -> int:
    """Bytes of one worker: float32 tensors of one cell."""
    if not device.is_cpu:
        return work_bytes(step, device, watched)
    return _dense_cell_bytes(step, device) * (_GRID_CELL_COPIES if _quantizes(step) else _DENSE_CELL_COPIES)


def one_cell_bytes(steps: Sequence[Step], device: Device) -> int:
    """Bytes that one cell in work takes, and a tile of it as it is stored, of the largest of `steps`."""
    weights = [step for step in steps if isinstance(step, Rewrite)]
    return max(
        (
            _work_bytes(step, device, watched=False)
            + max(
                offset(min(cell_rows(device, step), step.rows))
                for offset in (step.weight.decoder.row_offset, step.encoder.row_offset)
            )
            for step in weights
        ),
        default=0,
    )


def _dense_cell_bytes(step: Rewrite, device: Device) -> int:
    return min(cell_rows(device, step), step.rows) * step.columns * 4


def _block_bytes(step: Rewrite) -> int:
    """Bytes kept for every block until the weight is finished."""
    grids = [encoder.grid for encoder in (step.encoder, step.merge_base) if encoder is not None]
    chosen = _BYTES_PER_BLOCK * max((numbers(step, grid) for grid in grids), default=0)
    # Scales of a base that lies on another grid than the output: as read, and spread.
    of_base = step.weight.decoder.grid
    return chosen if of_base in grids else chosen + _BYTES_PER_READ_BLOCK * numbers(step, of_base)


def _held_bytes(step: Rewrite) -> int:
    """Bytes kept while a weight is worked on: base side parts, adapter in float32."""
    main = step.weight.decoder.main
    side = sum(part.nbytes for role, part in step.weight.parts.items() if role != main)
    adapter = sum(
        math.prod(part.shape) * (4 + part.dtype.itemsize)
        for update in step.updates
        for part in update.parts.values()
    )
    return side + adapter + (step.equalizer.nbytes if step.equalizer else 0)
