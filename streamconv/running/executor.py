"""Carries plans out: reader, compute and writer threads with bounded queues of reused buffers between.

    reader ──tiles──▶ compute ──tickets──▶ writer ──▶ Sink

A *slot* is a buffer for what is read of a tile and one for what is written in its place. All slots are allocated
once, before the first read; what bounds memory is their number, not the model. Compute hands tiles to the engine and
does not wait for them: the writer does, in file order. What is copied goes from reader to writer untouched.

A *lane* is one such row of threads. Of one output, several shards are in work at once where there are cores for it,
a lane each. Several outputs (`--also`) share one lane: a tile is read once, and written to every output whose turn it
is for that weight.

What a file holds in another order than by rows (`formats.base.Order`) is computed by rows all the same, into memory for
all of a weight. When that is complete, the file's lines are made of it, in slots of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamconv.progress import OnBytes, StopRequest
from streamconv.running.engines import open_engines
from streamconv.running.lanes import Run
from streamconv.running.sink import Output
from streamconv.storage.arrivals import ALL_HERE, Incoming


def run_plans(
    outputs: Sequence[Output], on_bytes: OnBytes, stop: StopRequest, sources: Incoming = ALL_HERE
) -> None:
    """Produce every output in one pass over their base, which is the same, and whose files are `sources`.

    `on_bytes` is called, from the calling thread, with the number of output bytes each time some have been
    written. Raises Stopped if `stop` was set; whatever a thread raised is raised here.
    """
    threads = torch.get_num_threads()
    # Cells are shared between workers of one thread each: faster than threads inside every operation on a busy
    # machine, and sums come out the same whatever the number of cores.
    torch.set_num_threads(1)
    memory = outputs[0].plan.memory
    lanes = memory.lanes if len(outputs) == 1 else 1
    try:
        with open_engines(outputs[0].plan.device, memory, lanes) as engines:
            Run(outputs, memory, engines, stop, sources).run(on_bytes)
    finally:
        torch.set_num_threads(threads)
