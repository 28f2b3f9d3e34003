"""How fast every format is written and read: streamconv, the library that owns the format, and memory, in one run.

A matrix in memory becomes the tensors of a format (nearest rounding; from bfloat16), and these a float32 matrix again,
as a merge does it: cell by cell, by workers that share the cells. The owner works on a matrix of the same size, with as
many threads, in a process of its own that waits while others run (`tools/bench/owners.py`). In each round the three run
in turn; the third is a copy, of which memory's speed is taken: it would read and write the bytes that streamconv has to
in `bytes` over that speed. Aimed at: ten times the owner's speed, or all but 15 % of memory's.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from streamconv.formats.gguf import PREFIX
from streamconv.kernels import compiled_kernels
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.running.workers import Workers
from tools.bench.format_weights import Decoding, Encoding, work_on
from tools.bench.owners import CLOCKS, DECODE, ENCODE, seconds_of
from tools.bench.results import RESULTS, ROOT, machine, save

TO_OWNER, TO_MEMORY = 10.0, 0.85
WORDS = "torch, as GPTQModel and AutoAWQ"
_HERE = ""  # streamconv's own environment
_LEAST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """A format, and the library that owns it, in an environment of `tools/foreign_environment` or streamconv's."""

    name: str
    owner: str
    environment: str = _HERE


def _cases() -> Iterator[Case]:
    for name in ("float32", "float16", "bfloat16"):
        yield Case(name, "torch")
    for name in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8"):
        yield Case(name, "bitsandbytes")
    for name in ("w4a16", "w4a16-asym", "w8a16", "w8a8", "fp8", "nvfp4a16", "mxfp4a16"):
        yield Case(name, "compressed-tensors")
    for name in ("gptq", "gptq-asym", "gptq, activation order", "gptq, 8 bit, activation order"):
        yield Case(name, WORDS)
    for name in ("awq", "awq-asym"):
        yield Case(name, WORDS)
    for name in ("fp8-block", "gpt-oss"):
        yield Case(name, "transformers")
    yield Case("nvfp4, ModelOpt", "ModelOpt", "transformers")
    for bits in (2, 3, 4, 5, 6, 8):
        yield Case(f"mlx{bits}", "mlx.core", "mlx")
    for owner in ("ggml", "gguf-py"):
        for name, kind in BLOCK_TYPES.items():
            if kind.block > 1:
                yield Case(PREFIX + name, owner, "llamacpp")


CASES = tuple(_cases())


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over rounds, in millions of weights a second; `memory`: copying as many bytes as streamconv moves."""

    format: str
    direction: str
    owner: str
    streamconv: float
    owners: float | None
    memory: float
    to_owner: float | None
    to_memory: float

    @property
    def is_met(self) -> bool:
        return (self.to_owner is not None and self.to_owner >= TO_OWNER) or self.to_memory >= TO_MEMORY


# -- who takes part ----------------------------------------------------------------------------------------------


class Owner:
    """A process with the owner's library, asked for seconds."""

    def __init__(self, name: str, environment: str, shape: tuple[int, int], threads: int, clock: str) -> None:
        python = sys.executable
        if environment:
            made = subprocess.run(
                (ROOT / "tools/foreign_environment", environment), check=True, capture_output=True, text=True
            )
            python = made.stdout.strip()
        command = (python, "-m", "tools.bench.owners", name, *map(str, shape), str(threads), clock)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self._name = name

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            sys.exit(f"{self._name} ended when it was asked for {line}")
        return answer

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Memory:
    """A copy between two matrices, shared by the workers."""

    source: Tensor
    target: Tensor
    workers: Workers

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return 2 * self.source.nbytes

    def run(self) -> None:
        self.workers.map(self._copy, range(len(self.source)))

    def _copy(self, number: int, part: range) -> None:
        del number
        self.target[part.start : part.stop].copy_(self.source[part.start : part.stop])


# -- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """All that is kept from case to case: processes, workers, and memory to copy."""

    shape: tuple[int, int]
    threads: int
    rounds: int
    seconds: float
    clock: str
    stack: ExitStack

    def __post_init__(self) -> None:
        self.owners: dict[tuple[str, str], Owner] = {}
        self.workers = self.stack.enter_context(Workers(self.threads))

    @cached_property
    def memory(self) -> Memory:
        return Memory(torch.ones(self.shape), torch.ones(self.shape), self.workers)

    def rows(self, case: Case) -> Iterator[Row]:
        owner = self._owner(case)
        able = owner.ask(case.name).split()
        encoding, decoding = work_on(case.name, self.shape, self.workers)
        for direction, work in ((ENCODE, encoding), (DECODE, decoding)):
            if work is not None and not (direction not in able and case.owner == "gguf-py"):
                yield self._measured(case, direction, work, owner if direction in able else None)

    def _owner(self, case: Case) -> Owner:
        key = case.owner, case.environment
        if key not in self.owners:
            self.owners[key] = Owner(*key, self.shape, self.threads, self.clock)
            self.stack.callback(self.owners[key].close)
        return self.owners[key]

    def _measured(self, case: Case, direction: str, work: Encoding | Decoding, owner: Owner | None) -> Row:
        weights = self.shape[0] * self.shape[1] / 1e6
        work.run()  # compiles what is compiled
        ours: list[float] = []
        theirs: list[float] = []
        memory: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(ours) < _LEAST_ROUNDS or (len(ours) < self.rounds and time.perf_counter() < end):
            ours.append(weights / seconds_of(work.run, self.clock, self.threads))
            if owner is not None:
                theirs.append(weights / float(owner.ask(direction)))
            copying = seconds_of(self.memory.run, self.clock, self.threads)
            memory.append(weights / (copying * work.nbytes / self.memory.nbytes))
        return Row(
            case.name,
            direction,
            case.owner,
            statistics.median(ours),
            statistics.median(theirs) if theirs else None,
            statistics.median(memory),
            _ratio(ours, theirs) if theirs else None,
            _ratio(ours, memory),
        )


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(own / other for own, other in zip(ours, others, strict=True))


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| | | M weights/s | owner | M weights/s | to the owner | share of memory's speed | |",
        "|---|---|--:|---|--:|--:|--:|---|",
    ]
    for row in rows:
        theirs = "" if row.owners is None else f"{row.owners:.0f}"
        ratio = "" if row.to_owner is None else f"{row.to_owner:.1f}"
        measured = f"{row.streamconv:.0f} | {row.owner} | {theirs} | {ratio} | {row.to_memory:.0%}"
        lines.append(
            f"| {row.format} | {row.direction} | {measured} | {'met' if row.is_met else '**missed**'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/formats", description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="formats; results are then only printed")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="at most")
    parser.add_argument("--seconds", type=float, default=1.2, metavar="S", help="after which three rounds do")
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="of the weight")
    parser.add_argument("--columns", type=int, default=4096, metavar="N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument(
        "--clock", choices=CLOCKS, default=CLOCKS[0], help="cpu: of processors, on a busy machine"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-formats.json")
    options = parser.parse_args(arguments)
    if compiled_kernels() is None:
        sys.exit("numba is not installed, or is told not to compile: there are no compiled kernels to time")
    torch.set_num_threads(1)
    shape, rows = (options.rows, options.columns), []
    with ExitStack() as stack:
        bench = Bench(shape, options.threads, options.rounds, options.seconds, options.clock, stack)
        for case in CASES:
            if fnmatch.fnmatch(case.name, options.only):
                found = list(bench.rows(case))
                rows += found
                print("\n".join(table(found).splitlines()[2:]), file=sys.stderr, flush=True)
    results = {
        "shape": shape,
        "threads": options.threads,
        "rounds": options.rounds,
        "clock": options.clock,
        "machine": machine(RESULTS) | {name: version(name) for name in ("numba", "compressed-tensors")},
        "medians": [asdict(row) for row in rows],
    }
    if options.only == "*":
        save(options.results, "tools/bench/formats", results)
    print(f"\n{options.rows} x {options.columns}, {options.threads} threads\n\n{table(rows)}")


if __name__ == "__main__":
    main()
