"""How fast a bf16 merge is against copying the files, and against PEFT: same disk, cold cache, synced to disk.

Each round runs every contender once, in rotating order, after dropping the input from the page cache. The table
gives medians over rounds; the ratio to copying is taken within each round first. GB/s counts the checkpoint
once, though all contenders read and write it. streamconv also hashes what it writes; copying does not.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.measure import folder_bytes, measure, torch_anon_bytes

ROOT = Path(__file__).resolve().parents[2]
COPY, STREAMCONV, PEFT = "cp -r; sync", "streamconv merge", "PEFT merge_and_unload"
VERSIONS = ("streamconv", "torch", "peft", "transformers", "safetensors")
PEFT_RAM_FACTOR = 1.5  # the whole model, and room for what it is saved from


@dataclass(frozen=True, slots=True)
class Run:
    """One contender in one round. `peak_bytes` is anonymous memory above an interpreter with torch loaded."""

    contender: str
    round: int
    wall_s: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the rounds of one contender; `to_copy` is wall time over that of copying in the same round."""

    contender: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    gb_per_s: float
    to_copy: float | None


def commands(folder: Path, out: Path) -> Mapping[str, Sequence[str]]:
    base, adapter = str(folder / "base"), str(folder / "adapter")
    copy = 'cp -r --reflink=never "$1" "$2" && sync "$2"/* "$2"'
    streamconv = ("merge", "--base", base, "--adapter", adapter, "-o", str(out), "--device", "cpu", "--json")
    return {
        COPY: ("sh", "-c", copy, "sh", base, str(out)),
        STREAMCONV: (sys.executable, "-m", "streamconv", *streamconv),
        PEFT: (sys.executable, str(ROOT / "tools/bench/peft_merge.py"), base, adapter, str(out)),
    }


def run_rounds(folder: Path, contenders: Sequence[str], rounds: int) -> list[Run]:
    """Run `rounds` rounds of `contenders`, each into the same place, emptied in between."""
    out = folder / "out"
    torch_bytes = torch_anon_bytes()
    runs = []
    for number in range(rounds):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            shutil.rmtree(out, ignore_errors=True)
            drop_cache(folder)
            cost = measure(commands(folder, out)[contender])
            if cost.exit_code:
                sys.exit(f"{cost.stderr}\n{contender} ended with exit {cost.exit_code}")
            peak = max(0, cost.peak_anon_bytes - torch_bytes)
            runs.append(Run(contender, number, cost.wall_s, cost.cpu_s, peak))
            print(f"round {number + 1}: {contender}: {cost.wall_s:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return runs


def drop_cache(folder: Path) -> None:
    """Write out all that is dirty and drop the files under `folder` from the page cache; all files, if root."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def summarize(runs: Sequence[Run], checkpoint_bytes: int) -> list[Summary]:
    copies = {run.round: run.wall_s for run in runs if run.contender == COPY}
    summaries = []
    for contender in dict.fromkeys(run.contender for run in runs):
        own = [run for run in runs if run.contender == contender]
        wall_s = statistics.median(run.wall_s for run in own)
        summaries.append(
            Summary(
                contender,
                wall_s,
                cpu_s=statistics.median(run.cpu_s for run in own),
                peak_bytes=int(statistics.median(run.peak_bytes for run in own)),
                gb_per_s=checkpoint_bytes / wall_s / 1e9,
                to_copy=statistics.median(run.wall_s / copies[run.round] for run in own) if copies else None,
            )
        )
    return summaries


def table(summaries: Sequence[Summary]) -> str:
    lines = ["| bf16 to bf16 | wall | CPU | peak memory | GB/s | to copying |", "|---|--:|--:|--:|--:|--:|"]
    for row in summaries:
        peak = "" if row.contender == COPY else f"{row.peak_bytes / 2**20:.0f} MiB"
        ratio = "" if row.to_copy is None else f"{row.to_copy:.2f}"
        cells = (
            row.contender,
            f"{row.wall_s:.1f} s",
            f"{row.cpu_s:.1f} s",
            peak,
            f"{row.gb_per_s:.2f}",
            ratio,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(folder: Path) -> dict[str, str | int]:
    """What a number depends on: processor, memory, kernel, file system, versions, commit."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().partition("-")[0],
        "file_system": _said("stat", "-f", "-c", "%T", str(folder)),
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
    }


def refusal(folder: Path, size: int, contenders: Sequence[str]) -> str | None:
    """Return why the benchmark cannot run here, or None: disk for what is still to be written, memory for PEFT."""
    needed = int(size * 1.02) * (1 if (folder / "base").is_dir() else 2)
    free = shutil.disk_usage(folder).free
    if needed > free:
        return f"{folder} needs {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free; choose a smaller --size"
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + _cached_bytes()
    if PEFT in contenders and size * PEFT_RAM_FACTOR > available:
        return (
            f"PEFT loads the whole model and would need {size * PEFT_RAM_FACTOR / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free; leave it out with --no-peft or choose a smaller --size"
        )
    return None


def _cached_bytes() -> int:
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return next(int(line[1]) * 1024 for line in lines if line[0] == "Cached:")


def _said(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/merge", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT / ".bench", help="holds base/ and adapter/"
    )
    parser.add_argument(
        "--size", type=parse_size, default=parse_size("6GB"), help="of the checkpoint, if made now"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds")
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/bench-merge.json")
    options = parser.parse_args(arguments)
    folder, contenders = options.folder, (COPY, STREAMCONV, *((PEFT,) if options.peft else ()))
    folder.mkdir(parents=True, exist_ok=True)
    layers = make_checkpoint.layers_for(options.size)
    if reason := refusal(folder, make_checkpoint.total_bytes(make_checkpoint.weights(layers)), contenders):
        sys.exit(reason)
    if not (folder / "base").is_dir():
        print(f"making a checkpoint of {layers} layers in {folder}", file=sys.stderr, flush=True)
        make_checkpoint.make(folder, layers, parse_size("5GB"), rank=16, seed=0)
    size = folder_bytes(folder / "base")
    runs = run_rounds(folder, contenders, options.runs)
    summaries = summarize(runs, size)
    results = {
        "made_by": "tools/bench/merge",
        "checkpoint_bytes": size,
        "machine": machine(folder),
        "medians": [asdict(row) for row in summaries],
        "runs": [asdict(run) for run in runs],
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{size / 1e9:.2f} GB, medians of {options.runs} rounds\n\n{table(summaries)}")


if __name__ == "__main__":
    main()
