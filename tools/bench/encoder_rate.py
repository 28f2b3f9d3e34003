"""Print how many bytes of bf16 weights a second this machine quantizes, from memory to memory, on all cores.

As `streamconv convert` does it, tile after tile with the next one waiting; `tools/bench/encode` takes it apart.
"""

import os
import sys
import time
from collections import deque

import torch

from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Rewrite
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Ticket, Workers

ROWS = 2048
IN_FLIGHT = 2


def encoder_rate(base: str, quant: str, seconds: float = 3.0) -> float:
    """Of the widest weight of the checkpoint `base`, in tiles of about 16 MiB or more."""
    plan = prepare(Job(base, None, MergeOptions(quant=quant), "cpu")).plan
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    step = max((step for step in steps if isinstance(step, Rewrite)), key=lambda step: step.columns)
    rows = range(min(ROWS, step.rows))
    raw = (torch.randn(len(rows), step.columns) * 0.02).bfloat16().view(torch.uint8).view(-1)
    outs = [torch.empty(step.encoder.row_offset(len(rows)), dtype=torch.uint8) for _ in range(IN_FLIGHT)]
    torch.set_num_threads(1)  # as in the executor, whose workers share a tile
    with Workers(len(os.sched_getaffinity(0))) as workers:
        work = WeightWork(step, {}, [], torch.device("cpu"), 0, workers)
        work.rewrite(raw, rows, outs[0]).wait()  # compiles what is compiled
        tickets: deque[Ticket] = deque()
        tiles, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            tickets.append(work.rewrite(raw, rows, outs[tiles % IN_FLIGHT]))
            tiles += 1
            if len(tickets) == IN_FLIGHT:
                tickets.popleft().wait()
        for ticket in tickets:
            ticket.wait()
        return tiles * raw.numel() / (time.perf_counter() - started)


if __name__ == "__main__":
    print(encoder_rate(sys.argv[1], sys.argv[2]))
