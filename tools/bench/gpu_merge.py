"""One merge in a process of its own, which prints what it took: seconds, bytes moved, and memory of the GPUs."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from streamconv.pipeline import Job, prepare, run
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Access, Plan, Rewrite
from streamconv.progress import StopRequest
from streamconv.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Merged:
    """`seconds` are those of the run, without the start of the interpreter and of CUDA, and without planning.

    `to_device_bytes` and `from_device_bytes` are tiles on their way to be computed and back. `peak_vram_bytes` is the
    most that tensors took on any GPU, `reserved_vram_bytes` what torch held for them.
    """

    seconds: float
    read_bytes: int
    written_bytes: int
    to_device_bytes: int
    from_device_bytes: int
    lanes: int
    tile_bytes: int
    planned_ram_bytes: int
    planned_vram_bytes: int
    peak_vram_bytes: int
    reserved_vram_bytes: int
    kept_delta: float | None


def merge(base: Path, adapter: Path, out: Path, options: MergeOptions, device: str) -> Merged:
    prepared = prepare(Job(str(base), str(adapter), options, device))
    plan, memory = prepared.plan, prepared.plan.memory
    report = run(prepared, out, lambda done, total: None, StopRequest())
    gpus = () if plan.device.is_cpu else plan.device.names
    sent, received = tile_bytes(plan)
    return Merged(
        seconds=report.seconds,
        read_bytes=report.bytes_read,
        written_bytes=report.bytes_written,
        to_device_bytes=sent,
        from_device_bytes=received,
        lanes=memory.lanes,
        tile_bytes=memory.buffer,
        planned_ram_bytes=memory.ram,
        planned_vram_bytes=memory.vram,
        peak_vram_bytes=max((torch.cuda.max_memory_allocated(gpu) for gpu in gpus), default=0),
        reserved_vram_bytes=max((torch.cuda.max_memory_reserved(gpu) for gpu in gpus), default=0),
        kept_delta=report.kept_delta,
    )


def tile_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of tiles that are brought to a device, twice for weights that are read twice, and of those brought back."""
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    rewrites = [step for step in steps if isinstance(step, Rewrite)]
    sent = sum(
        step.weight.decoder.row_offset(step.rows) * (1 if step.access is Access.ROW else 2)
        for step in rewrites
    )
    return sent, sum(step.encoder.row_offset(step.rows) for step in rewrites)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu_merge", description=__doc__)
    for name in ("base", "adapter", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quant", default="keep")
    parser.add_argument("--merge-base", default="original")
    parser.add_argument("--max-vram", type=parse_size, default=2**31)
    given = parser.parse_args()
    options = MergeOptions(
        quant=given.quant, merge_base=given.merge_base, max_vram_bytes=given.max_vram, min_kept=0.0
    )
    print(json.dumps(asdict(merge(given.base, given.adapter, given.out, options, given.device))))


if __name__ == "__main__":
    main()
