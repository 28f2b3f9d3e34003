"""Merging and quantizing on a GPU: two layers of a 70B model with its embedding and head, against PCIe and the disk.

Every kind of merge runs in a process of its own from a cold cache, with a small and a large --max-vram, and is
compared with the least that the same bytes take: read from and written to the same disk one after the other, or over
PCIe in both directions at once, whichever is longer. The cost of 80 layers is that of these bytes times their number.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.bench.gpu_merge import Merged
from tools.bench.merge import checked, drop_cache
from tools.bench.models import MODELS, Model
from tools.bench.results import FOLDER, RESULTS, machine, save
from tools.measure import folder_bytes, measure

LAYERS = 2
CHUNK = 2**23
PCIE_BYTES = 2**28
PCIE_RUNS = 9


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    quant: str
    merge_base: str = "original"


KINDS = (
    Kind("bf16 to bf16", "keep"),
    Kind("bf16 to nf4", "nf4"),
    Kind("bf16 to nf4-dq from T", "nf4-dq", "nf4-dq"),
    Kind("bf16 to int8", "int8"),
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second: over PCIe to the device and from it, pinned; and of the disk, cold and synced."""

    to_device: float
    from_device: float
    read: float
    write: float

    def bound_s(self, merged: Merged) -> float:
        """The least that this merge could take."""
        disk = merged.read_bytes / self.read + merged.written_bytes / self.write
        return max(
            disk,
            merged.to_device_bytes / self.to_device,
            merged.from_device_bytes / self.from_device,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One merge; `ram_bytes` is its peak anonymous and pinned memory above a process that has only started CUDA."""

    kind: str
    max_vram: str
    merged: Merged
    wall_s: float
    ram_bytes: int
    bound_s: float

    @property
    def exceeds_plan(self) -> bool:
        return self.merged.peak_vram_bytes > self.merged.planned_vram_bytes


# -- what the machine can do -------------------------------------------------------------------------------------


def card(device: torch.device) -> dict[str, Any]:
    """The GPU; nothing for a CPU."""
    if device.type == "cpu":
        return {"name": "none, this is a trial on the CPU"}
    found = torch.cuda.get_device_properties(device)
    query = ("--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader")
    try:
        said = subprocess.run(("nvidia-smi", *query), check=False, capture_output=True, text=True).stdout
    except FileNotFoundError:
        said = ""
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver, PCIe generation and width": said.splitlines()[0] if said else "unknown",
    }


def pcie_rates(device: torch.device, nbytes: int) -> tuple[float, float]:
    """Bytes a second of the median copy of `nbytes` between pinned memory and the device, there and back."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def rate(copy: Callable[[], object]) -> float:
        times = []
        for _ in range(PCIE_RUNS):
            started = time.perf_counter()
            copy()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        return nbytes / statistics.median(times)

    return (
        rate(lambda: there.copy_(host, non_blocking=True)),
        rate(lambda: host.copy_(there, non_blocking=True)),
    )


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second of reading `folder/base` from a cold cache, and of writing as much again, synced."""
    drop_cache(folder)
    buffer = memoryview(bytearray(CHUNK))
    files = sorted((folder / "base").glob("*.safetensors"))
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    read_s = time.perf_counter() - started
    total = folder_bytes(folder / "base")
    buffer[:] = os.urandom(CHUNK)
    target = folder / "written"
    started = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for start in range(0, total, CHUNK):
            file.write(buffer[: min(CHUNK, total - start)])
        os.fsync(file.fileno())
    write_s = time.perf_counter() - started
    target.unlink()
    return total / read_s, total / write_s


def idle_bytes(device: str) -> int:
    """Anonymous memory of a process that has imported torch and started CUDA on `device`, and done nothing."""
    script = (
        "import sys, torch; from streamconv.progress import anonymous_bytes; "
        "torch.zeros(1, device=sys.argv[1]); print(anonymous_bytes(pinned=True))"
    )
    command = (sys.executable, "-c", script, device)
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# -- merges ------------------------------------------------------------------------------------------------------


def run(folder: Path, kind: Kind, max_vram: str, device: str, rates: Rates, idle: int) -> Result:
    """One merge of what is in `folder`; its output is removed again."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    drop_cache(folder)
    options = {
        "base": folder / "base",
        "adapter": folder / "adapter",
        "out": out,
        "device": device,
        "quant": kind.quant,
        "merge-base": kind.merge_base,
        "max-vram": max_vram,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = (sys.executable, "-m", "tools.bench.gpu_merge", *arguments)
    cost = checked(measure(command, pinned=True), f"{kind.name} with --max-vram {max_vram}")
    shutil.rmtree(out)
    merged = Merged(**json.loads(cost.stdout.splitlines()[-1]))
    ram = max(0, cost.peak_anon_bytes - idle)
    return Result(kind.name, max_vram, merged, cost.wall_s, ram, rates.bound_s(merged))


HEADER = (
    "| merge | --max-vram | run | of input | to the bound | VRAM, planned | RAM, planned | lanes |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
)


def row(result: Result) -> str:
    merged = result.merged
    cells = (
        result.kind,
        result.max_vram,
        f"{merged.seconds:.2f} s",
        f"{merged.read_bytes / merged.seconds / 1e9:.2f} GB/s",
        f"{merged.seconds / result.bound_s:.2f}",
        f"{mib(merged.peak_vram_bytes)}, {mib(merged.planned_vram_bytes)}",
        f"{mib(result.ram_bytes)}, {mib(merged.planned_ram_bytes)}",
        f"{merged.lanes}",
    )
    return "| " + " | ".join(cells) + " |"


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def extrapolated(result: Result, measured: Model, whole: Model) -> str:
    """What all layers would take, with the arithmetic."""
    seconds, part = result.merged.seconds, measured.nbytes
    return (
        f"{result.kind}, --max-vram {result.max_vram}: {seconds:.2f} s / {part / 1e9:.2f} GB "
        f"({measured.layers} layers) = {seconds / part * 1e9:.3f} s/GB; x {whole.nbytes / 1e9:.1f} GB "
        f"({whole.layers} layers) = {seconds / part * whole.nbytes:.0f} s"
    )


def as_json(result: Result, measured: Model, whole: Model) -> dict[str, Any]:
    seconds = result.merged.seconds / measured.nbytes * whole.nbytes
    return {**asdict(result), "input_bytes": measured.nbytes, f"seconds_for_{whole.layers}_layers": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/gpu", description=__doc__)
    parser.add_argument(
        "--device", default="cuda", help="cuda (all like the first), cuda:N, or cpu for a trial"
    )
    parser.add_argument("--model", choices=MODELS, default="llama-70b")
    parser.add_argument("--size", type=parse_size, help=f"rounded to whole layers; default {LAYERS} layers")
    parser.add_argument("--max-vram", default="2GiB,20GiB", help="budgets, one after the other")
    parser.add_argument("--folder", type=Path, default=FOLDER / "gpu")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there for another run")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-gpu.json")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(
            "tools/bench/gpu: torch sees no CUDA device, so nothing was measured; run it on a machine with a GPU, or "
            "try its code with --device cpu --model tiny"
        )
    whole = MODELS[options.model]
    model = whole.of_size(options.size) if options.size else replace(whole, layers=LAYERS)
    results = measure_all(options.folder, model, options.device, options.max_vram.split(","))
    if not options.keep:
        shutil.rmtree(options.folder)
    merges = [as_json(result, model, whole) for result in results.merges]
    about = {**results.about, "model": options.model, "layers": model.layers, "merges": merges}
    save(options.results, "tools/bench/gpu", about)
    show(results, model, whole)
    if over := [result.kind for result in results.merges if result.exceeds_plan]:
        sys.exit(f"tools/bench/gpu: more VRAM was used than planned: {', '.join(over)}")


@dataclass(frozen=True, slots=True)
class Measured:
    about: Mapping[str, Any]
    rates: Rates
    merges: Sequence[Result]


def measure_all(folder: Path, model: Model, device: str, budgets: Sequence[str]) -> Measured:
    """Everything, in one folder, which gets `base` and `adapter` if it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        make_checkpoint.check_disk(folder, int(2.1 * model.nbytes))
        say(f"making {model.layers} layers, {model.nbytes / 1e9:.1f} GB, in {folder}")
        make_checkpoint.make(folder, model, parse_size("5GB"), rank=16, seed=0)
    where = torch.device(device)
    say("measuring PCIe and the disk")
    rates = Rates(*pcie_rates(where, min(PCIE_BYTES, model.nbytes)), *disk_rates(folder))
    idle = idle_bytes(device)
    merges = []
    for kind in KINDS:
        for budget in budgets:
            say(f"{kind.name}, --max-vram {budget}")
            merges.append(run(folder, kind, budget, device, rates, idle))
    about = {"machine": machine(folder), "card": card(where), "bytes_per_s": asdict(rates)}
    return Measured(about, rates, merges)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: Measured, model: Model, whole: Model) -> None:
    rates = results.rates
    print(f"\n{results.about['card']['name']}, {model.nbytes / 1e9:.2f} GB of bf16 in {model.layers} layers")
    print(f"PCIe {rates.to_device / 1e9:.1f} GB/s to the device, {rates.from_device / 1e9:.1f} from it")
    print(f"disk {rates.read / 1e9:.2f} GB/s read, {rates.write / 1e9:.2f} written\n")
    print("\n".join((*HEADER, *map(row, results.merges))))
    print(f"\nAll {whole.layers} layers:")
    print("\n".join(extrapolated(result, model, whole) for result in results.merges), flush=True)


if __name__ == "__main__":
    main()
