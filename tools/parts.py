"""One output made by several workers on a folder they share, started as users start them: the bytes of one process.

By hand, by torchrun, and by a real Slurm of one node: srun, and an array of which one task is requeued in its midst.
Walls are of this machine, whose processors the workers share: they say what sharing costs, not what nodes gain. What
many workers would have to write is computed from the plan of a model of 405B parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from streamconv.pipeline import build_job, prepare
from streamconv.planning.parts import shares
from tests.models import Sizes, write_adapter, write_base
from tools.bench import plan
from tools.bench.models import MODELS
from tools.slurm import Slurm, is_installed, running

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results/parts.json"
PROGRAM = ROOT / ".venv/bin/streamconv"
DEPLOY = ROOT / "tools/deploy"
SIZES = Sizes(hidden=1024, inner=2816, layers=24, vocabulary=8000)
SHARDS = 12
FORMATS = {"keep": (), "nf4-dq": ("--quant", "nf4-dq", "--max-shard-size", "12MB")}
WORKERS = (1, 2, 4)
MANY = (2, 8, 16, 64)

Tree = Mapping[str, str]


def tree(folder: Path) -> Tree:
    """SHA-256 of every file under a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Inputs:
    """A model and an adapter in a folder, and what one process makes of them, by format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = write_base(folder / "base", SIZES.shapes, shards=SHARDS)
        self.adapter = write_adapter(folder / "adapter", SIZES.shapes)
        self.alone: dict[str, Tree] = {}

    def options(self, quant: str, out: Path) -> list[str]:
        paths = ("--base", str(self.base), "--adapter", str(self.adapter), "-o", str(out), "--device", "cpu")
        return [*paths, *FORMATS[quant]]

    def out(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def check(self, quant: str, out: Path) -> None:
        """Raise AssertionError unless `out` is what one process makes."""
        if quant not in self.alone:
            alone = self.out("alone")
            subprocess.run([PROGRAM, "merge", *self.options(quant, alone), "--quiet"], check=True)
            self.alone[quant] = tree(alone)
        assert tree(out) == self.alone[quant], f"{out} is not what one process makes"


# -- workers started by hand -----------------------------------------------------------------------------------------


def by_hand(inputs: Inputs, runs: int) -> list[dict[str, Any]]:
    """Median wall of 1, 2 and 4 processes that make one output side by side."""
    rows = []
    for quant in FORMATS:
        for count in WORKERS:
            walls, works = zip(*(_wall(inputs, quant, count) for _ in range(runs)), strict=True)
            rows.append(
                {
                    "quant": quant,
                    "workers": count,
                    "wall_s": round(statistics.median(walls), 2),
                    "planned_to_done_s": round(statistics.median(works), 2),
                    "runs": runs,
                }
            )
    return rows


def _wall(inputs: Inputs, quant: str, count: int) -> tuple[float, float]:
    """Seconds from start to end of all, and from the first that has planned on: interpreters are started, too."""
    out, began = inputs.out("by-hand"), time.perf_counter()
    parts = [["--part", f"{number}/{count}"] if count > 1 else [] for number in range(1, count + 1)]
    command = [str(PROGRAM), "merge", *inputs.options(quant, out), "--quiet", "--json-progress"]
    workers = [subprocess.Popen([*command, *part], stderr=subprocess.PIPE, text=True) for part in parts]
    said = [worker.communicate()[1] for worker in workers]
    codes = [worker.returncode for worker in workers]
    wall = time.perf_counter() - began
    lines = [json.loads(line) for each in said for line in each.splitlines() if line.startswith("{")]
    planned = min(line["time"] for line in lines if line["phase"] == "open")
    assert codes == [0] * count, codes
    inputs.check(quant, out)
    return wall, max(line["time"] for line in lines) - planned


# -- launchers ---------------------------------------------------------------------------------------------------------


def by_torchrun(inputs: Inputs) -> dict[str, Any]:
    out, began = inputs.out("by-torchrun"), time.perf_counter()
    launch = [str(ROOT / ".venv/bin/torchrun"), "--nproc-per-node", "2", "--no-python", str(PROGRAM)]
    command = [*launch, "merge", *inputs.options("nf4-dq", out), "--part", "auto", "--quiet"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wall = time.perf_counter() - began
    inputs.check("nf4-dq", out)
    return {"launcher": "torchrun --nproc-per-node 2", "version": torch.__version__, "wall_s": round(wall, 1)}


def by_slurm(inputs: Inputs) -> list[dict[str, Any]]:
    """An srun of two tasks, the script with srun, and the script of an array with a requeue; nothing without Slurm."""
    if not is_installed():
        return []
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running(Path(folder)) as slurm:
        return [_srun(inputs, slurm), _srun_script(inputs, slurm), _array(inputs, slurm)]


def _row(slurm: Slurm, launcher: str, began: float) -> dict[str, Any]:
    return {"launcher": launcher, "version": slurm.version, "wall_s": round(time.perf_counter() - began, 1)}


def _srun(inputs: Inputs, slurm: Slurm) -> dict[str, Any]:
    out, began = inputs.out("by-srun"), time.perf_counter()
    command = ["srun", "-n2", "--overcommit", str(PROGRAM), "merge", *inputs.options("keep", out)]
    slurm.run(*command, "--part", "auto", "--quiet")
    inputs.check("keep", out)
    return _row(slurm, "srun -n2", began)


def _script(slurm: Slurm, name: str, *sbatch: str, options: Sequence[str], logs: Path) -> str:
    """Submit one of the scripts, with what this node has in place of what they ask for; the id of the job."""
    fits = ("--parsable", "--cpus-per-task=1", "--mem=0", f"--output={logs}/%x-%A-%a.log", *sbatch)
    exported = f"--export=ALL,STREAMCONV={PROGRAM}"
    return slurm.run("sbatch", *fits, exported, DEPLOY / name, *options, cwd=logs).strip()


def _srun_script(inputs: Inputs, slurm: Slurm) -> dict[str, Any]:
    out, began = inputs.out("by-srun-script"), time.perf_counter()
    options = inputs.options("nf4-dq", out)
    job = _script(slurm, "slurm-srun.sh", "--nodes=1", "--overcommit", options=options, logs=inputs.folder)
    _wait(slurm, job, logs=inputs.folder)
    inputs.check("nf4-dq", out)
    return _row(slurm, "sbatch tools/deploy/slurm-srun.sh", began)


def _array(inputs: Inputs, slurm: Slurm) -> dict[str, Any]:
    """An array of four, of which the second task is killed and requeued while it writes its first file."""
    out, began = inputs.out("by-array"), time.perf_counter()
    job = _script(slurm, "slurm-array.sh", options=inputs.options("keep", out), logs=inputs.folder)
    part = out / ".streamconv/part-2-of-4"
    _wait_until(
        lambda: any(part.glob("*.partial")) if part.is_dir() else False, "the second task has begun to write"
    )
    slurm.run("scontrol", "requeue", f"{job}_1")
    _wait(slurm, *(f"{job}_{task}" for task in range(4)), logs=inputs.folder)
    inputs.check("keep", out)
    log = (inputs.folder / f"streamconv-{job}-1.log").read_text()
    starts = [json.loads(line) for line in log.splitlines() if '"phase": "plan"' in line]
    assert len(starts) == 2, f"the task that was requeued ran {len(starts)} times:\n{log}"
    row = _row(slurm, "sbatch --array=0-3 tools/deploy/slurm-array.sh, task 1 requeued while it wrote", began)
    return row | {
        "task_1_ran": len(starts),
        "task_1_was_stopped": "stopping; everything finished is kept" in log,
    }


def _wait(slurm: Slurm, *jobs: str, logs: Path) -> None:
    """Wait until jobs are done. Raises AssertionError with their logs where one fails."""
    states: dict[str, str] = {}

    def are_done() -> bool:
        states.update((job, slurm.state(job)) for job in jobs)
        return all(
            state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "GONE") for state in states.values()
        )

    _wait_until(are_done, "the jobs are done")
    said = "\n".join(path.read_text() for path in logs.glob("*.log"))
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{said}"


def _wait_until(holds: Any, what: str, limit_s: float = 300) -> None:
    ends = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.1)


# -- many workers --------------------------------------------------------------------------------------------------


def balance(folder: Path) -> list[dict[str, Any]]:
    """Bytes of the fullest part over the mean of all, for a model of 405B parameters whose weights are a hole."""
    plan.make(folder, MODELS["llama-405b"], 5 * 10**9, 1)
    rows = []
    for quant in ("keep", "nf4-dq"):
        job = build_job(folder / "base", folder / "adapter", quant=quant, device="cpu")
        shards = prepare(job).plan.shards
        for count in MANY:
            loads = [sum(shard.size for shard in part) for part in shares(shards, count)]
            rows.append(
                {
                    "model": "llama-405b",
                    "quant": quant,
                    "files": len(shards),
                    "workers": count,
                    "most_bytes": max(loads),
                    "least_bytes": min(loads),
                    "speed_up_at_most": round(sum(loads) / max(loads), 2),
                }
            )
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/parts", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each measured wall")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="parts-") as name:
        folder = Path(name)
        inputs = Inputs(folder)
        found = {
            "made_by": "tools/parts",
            "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": version("torch")},
            "checkpoint_bytes": sum(path.stat().st_size for path in inputs.base.glob("*.safetensors")),
            "walls": by_hand(inputs, given.runs),
            "launchers": [by_torchrun(inputs), *by_slurm(inputs)],
            "balance": balance(folder / "405b"),
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
