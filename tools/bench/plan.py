"""How long planning takes, and how much memory, for checkpoints of headers alone: their weights are holes.

The adapters are whole, on every linear layer and every expert: planning hashes them. `wall` is that of the command
`streamconv plan`, `start-up` that of a command just before which imports as much and plans nothing; `API` is the time
of the call that plans; memory is the command's, above an interpreter with torch loaded.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from streamconv.checkpoint.header import build_header
from streamconv.dtypes import BF16
from tools.bench.make_checkpoint import start_checkpoint, write_adapter
from tools.bench.models import MODELS, Model, total_bytes
from tools.bench.results import FOLDER, RESULTS, machine, save
from tools.measure import Cost, measure, torch_anon_bytes


@dataclass(frozen=True, slots=True)
class Case:
    """A model, in how many shards, and the rank of the adapter on it; what planning may take."""

    model: str
    max_shard_bytes: int
    rank: int
    quant: str
    wall_limit_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    """Medians. `peak_bytes` is anonymous memory above an interpreter with torch loaded, the highest seen."""

    model: str
    quant: str
    tensors: int
    shards: int
    checkpoint_bytes: int
    adapter_tensors: int
    adapter_bytes: int
    wall_s: float
    start_s: float
    api_s: float
    peak_bytes: int
    wall_limit_s: float
    runs: int


# Experts' rank is 1: the time is in the number of tensors, and rank 16 would make an adapter of 25 GB.
CASES = tuple(
    Case(model, 5 * 10**9, rank, quant, limit)
    for model, rank, limit in (("llama-70b", 16, 2), ("llama-405b", 16, 20), ("moe-1t", 1, 20))
    for quant in ("keep", "nf4-dq")
)
MEMORY_LIMIT = 500 * 10**6
# Prints seconds of planning alone. Not through the package's public names, which have no plan.
API = """
import sys, time
from streamconv.planning.options import MergeOptions
from streamconv.pipeline import Job, prepare
base, adapter, quant = sys.argv[1:]
started = time.perf_counter()
prepare(Job(base, adapter, MergeOptions(quant=quant), "cpu"))
print(time.perf_counter() - started)
"""


def make(out: Path, model: Model, max_shard_bytes: int, rank: int) -> None:
    """Write `base`, whose shards are headers before a hole, and `adapter` into the folder `out`."""
    shutil.rmtree(out, ignore_errors=True)
    for name, shard in start_checkpoint(out / "base", model, max_shard_bytes):
        header = build_header(shard, {"format": "pt"})
        with (out / "base" / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + total_bytes(shard))
    write_adapter(out / "adapter", model, rank, seed=1, dtype=BF16)


def time_case(case: Case, folder: Path, torch_bytes: int, runs: int) -> Planned:
    model, paths = MODELS[case.model], (str(folder / "base"), str(folder / "adapter"))
    base, adapter = paths
    options = ("--base", base, "--adapter", adapter, "--quant", case.quant, "--device", "cpu")
    command = (sys.executable, "-m", "streamconv", "plan", *options)
    starts, plans = zip(*((start(), _checked(measure(command))) for _ in range(runs)), strict=True)
    calls = [_checked(measure((sys.executable, "-c", API, *paths, case.quant))) for _ in range(runs)]
    return Planned(
        model=case.model,
        quant=case.quant,
        tensors=len(model.tensors),
        shards=len(list((folder / "base").glob("*.safetensors"))),
        checkpoint_bytes=model.nbytes,
        adapter_tensors=2 * len(model.linears) * model.layers,
        adapter_bytes=(folder / "adapter/adapter_model.safetensors").stat().st_size,
        wall_s=statistics.median(cost.wall_s for cost in plans),
        start_s=statistics.median(cost.wall_s for cost in starts),
        api_s=statistics.median(float(cost.stdout) for cost in calls),
        peak_bytes=max(0, max(cost.peak_anon_bytes for cost in plans) - torch_bytes),
        wall_limit_s=case.wall_limit_s,
        runs=runs,
    )


def _checked(cost: Cost) -> Cost:
    if cost.exit_code:
        sys.exit(f"{cost.stderr}\nplanning ended with exit {cost.exit_code}")
    return cost


def start() -> Cost:
    """Of a command that imports what `plan` does and reads nothing."""
    return _checked(measure((sys.executable, "-c", "import streamconv.cli, streamconv.pipeline")))


HEADER = (
    "| headers of | output | tensors | shards | adapter | wall | start-up | API | peak memory |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|",
)


def row(planned: Mapping[str, float | str | int]) -> str:
    """One line of the table, from a result as it is stored."""
    size, adapter = float(planned["checkpoint_bytes"]), float(planned["adapter_bytes"])
    cells = (
        f"{planned['model']}, {size / 1e9:.0f} GB",
        f"{planned['quant']}",
        f"{planned['tensors']}",
        f"{planned['shards']}",
        f"{planned['adapter_tensors']} in {adapter / 1e9:.1f} GB",
        f"{planned['wall_s']:.2f} s",
        f"{planned['start_s']:.2f} s",
        f"{planned['api_s']:.2f} s",
        f"{float(planned['peak_bytes']) / 1e6:.0f} MB",
    )
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/plan", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER / "plan", help="for headers and adapters, 4 GB")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; may be repeated")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each; medians are shown")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-plan.json")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.model is None or case.model in options.model]
    torch_bytes = torch_anon_bytes()
    options.folder.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(options.folder)}
    rows, made = [], ""
    print("\n".join(HEADER), flush=True)
    for case in cases:
        if made != case.model:
            make(options.folder, MODELS[case.model], case.max_shard_bytes, case.rank)
            made = case.model
        planned = asdict(time_case(case, options.folder, torch_bytes, options.runs))
        rows.append(planned)
        save(options.results, "tools/bench/plan", {**about, "rows": rows})
        print(row(planned), flush=True)
    shutil.rmtree(options.folder)
    over = [
        f"{one['model']} {one['quant']}"
        for one in rows
        if one["wall_s"] - one["start_s"] > one["wall_limit_s"] or one["peak_bytes"] > MEMORY_LIMIT
    ]
    if over:
        sys.exit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
