"""Print how many bytes of bf16 weights a second this machine encodes as nf4, from memory to memory, on all cores."""

import os
import sys
import time

import torch

from streamconv.cells import WeightWork, Workers
from streamconv.pipeline import Job, prepare
from streamconv.plan import MergeOptions, Rewrite

ROWS = 2048
SECONDS = 3.0


def encoder_rate(base: str, quant: str) -> float:
    """Of the widest weight of the checkpoint `base`, in tiles of as many rows as fit the processor's caches badly."""
    plan = prepare(Job(base, None, MergeOptions(quant=quant), "cpu")).plan
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    step = max((step for step in steps if isinstance(step, Rewrite)), key=lambda step: step.columns)
    rows = range(min(ROWS, step.rows))
    raw = torch.randn(len(rows) * step.columns).mul_(0.02).to(torch.bfloat16).view(torch.uint8)
    out = torch.empty(step.encoder.row_offset(len(rows)), dtype=torch.uint8)
    torch.set_num_threads(1)  # as the executor does
    with Workers(len(os.sched_getaffinity(0))) as workers:
        work = WeightWork(step, {}, [], torch.device("cpu"), 0, workers)
        work.rewrite(raw, rows, out)  # compiles what is compiled
        tiles, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < SECONDS:
            work.rewrite(raw, rows, out)
            tiles += 1
    return tiles * raw.numel() / elapsed


if __name__ == "__main__":
    print(encoder_rate(sys.argv[1], sys.argv[2]))
