"""How fast a CPU quantizes: bitsandbytes, and streamconv with its torch and its compiled kernels, in one process.

Every contender takes the same bfloat16 weight to codes and scales in memory; streamconv does it as `streamconv convert`
does, cell by cell, and two lines more as a merge does. In each round all run once, in turn; the table gives medians, of
GB/s of bfloat16 read and of the ratio to bitsandbytes within each round. Before anything is timed, the bytes of all are
compared. With two threads, streamconv's workers share the cells between them, and bitsandbytes has two torch threads.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from torch import Tensor

from streamconv.adapters.lora import LoraUpdate
from streamconv.dtypes import BF16
from streamconv.formats import FORMATS
from streamconv.formats.base import Weight
from streamconv.formats.dense import DenseDecoder
from streamconv.kernels import compiled_kernels
from streamconv.planning.plan import Rewrite
from streamconv.rounding import ROUNDINGS
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Workers
from tools.bench.results import RESULTS, machine, save

NAME = "model.layers.0.mlp.up_proj.weight"
BNB, TORCH, COMPILED = "bitsandbytes", "torch kernels", "compiled kernels"
RANK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """What is written; `merges` adds a LoRA update and measures what survives of it."""

    format: str
    rounding: str = "nearest"
    merges: bool = False

    @property
    def label(self) -> str:
        return f"{self.format}, {self.rounding}" + (f", LoRA of rank {RANK}" if self.merges else "")


CASES = (
    Case("nf4"),
    Case("fp4"),
    Case("int8"),
    Case("nf4", "stochastic"),
    Case("nf4", merges=True),
    Case("nf4", "stochastic", merges=True),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over rounds: `gb_per_s` of bfloat16 input; `to_bitsandbytes` where that can do the same."""

    case: str
    threads: int
    contender: str
    gb_per_s: float
    to_bitsandbytes: float | None


def quantize_as_bitsandbytes(weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    if case.format == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight.half())
    else:
        codes, state = quantize_4bit(weight, quant_type=case.format)
        scales = state.absmax
    return codes.view(torch.uint8).flatten(), scales


def comparable(codes: Tensor, scales: Tensor, case: Case) -> bytes:
    """Their bytes; of fp4's two zeros, which one it is depends on the sign in bitsandbytes, only the first."""
    if case.format == "fp4":
        codes = torch.cat([torch.where(half == 8, 0, half) for half in (codes >> 4, codes & 0xF)])
    return codes.numpy().tobytes() + scales.numpy().tobytes()


class Streamconv:
    """One weight, its adapter, and where its codes go."""

    def __init__(self, weight: Tensor, case: Case, workers: Workers) -> None:
        rows, columns = self.shape = tuple(weight.shape)
        self.raw = weight.view(torch.uint8).view(-1)
        stored = Weight(NAME, self.shape, BF16, BF16.name, DenseDecoder(BF16, columns), MappingProxyType({}))
        update = LoraUpdate(NAME, self.shape, MappingProxyType({}), 1.0, transposed=False)
        encoder = FORMATS[case.format].encoder(NAME, self.shape, BF16)
        updates = (update,) if case.merges else ()
        self.step = Rewrite(NAME, stored, updates, encoder, ROUNDINGS[case.rounding])
        factors = {"lora_A": torch.randn(RANK, columns) * 1e-3, "lora_B": torch.randn(rows, RANK)}
        self.parts = [factors] if case.merges else []
        self.out = torch.empty(encoder.row_offset(rows), dtype=torch.uint8)
        self.workers = workers

    def quantize(self) -> tuple[bytes, ...]:
        """Write the codes; return the parts after them."""
        work = WeightWork(self.step, {}, self.parts, torch.device("cpu"), 0, self.workers)
        work.rewrite(self.raw, range(self.shape[0]), self.out).wait()
        return work.finish()[0]

    def quantized(self) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        parts = dict(zip([spec.name for spec in self.step.encoder.parts[1:]], self.quantize(), strict=True))
        scales = next(content for name, content in parts.items() if name.endswith(("absmax", "SCB")))
        return self.out, torch.frombuffer(bytearray(scales), dtype=torch.float32)


@contextmanager
def using(contender: str, threads: int) -> Iterator[None]:
    """Torch with as many threads as `contender` wants of it, and the kernels it is to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if contender == BNB else 1)
    with mock.patch(
        "streamconv.kernels.compiled_kernels", compiled_kernels if contender == COMPILED else lambda: None
    ):
        yield
    torch.set_num_threads(before)


def measure(weight: Tensor, case: Case, threads: int, rounds: int) -> list[Row]:
    """Compare the bytes of all contenders, then time them in turn."""
    with Workers(threads) as workers:
        ours = Streamconv(weight, case, workers)
        calls: dict[str, Callable[[], object]] = {COMPILED: ours.quantize, TORCH: ours.quantize}
        results = {COMPILED: ours.quantized, TORCH: ours.quantized}
        if case.rounding == "nearest" and not case.merges:
            results[BNB] = partial(quantize_as_bitsandbytes, weight, case)
            calls[BNB] = results[BNB]
        found = set()
        for contender, result in results.items():
            with using(contender, threads):
                found.add(comparable(*result(), case))
        if len(found) > 1:
            sys.exit(f"{case.label}: the bytes differ")
        seconds: dict[str, list[float]] = {contender: [] for contender in calls}
        for _ in range(rounds):
            for contender, call in calls.items():
                with using(contender, threads):
                    seconds[contender].append(_seconds(call))
    return [_row(case, threads, contender, seconds, 2 * weight.numel()) for contender in reversed(calls)]


def _row(
    case: Case, threads: int, contender: str, seconds: Mapping[str, Sequence[float]], nbytes: int
) -> Row:
    own = seconds[contender]
    ratios = [theirs / mine for theirs, mine in zip(seconds.get(BNB, ()), own, strict=False)]
    rate = statistics.median(nbytes / 1e9 / wall for wall in own)
    return Row(case.label, threads, contender, rate, statistics.median(ratios) if ratios else None)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def table(rows: Sequence[Row]) -> str:
    lines = ["| bf16 to | threads | | GB/s | to bitsandbytes |", "|---|--:|---|--:|--:|"]
    for row in rows:
        ratio = "" if row.to_bitsandbytes is None else f"{row.to_bitsandbytes:.1f}"
        lines.append(f"| {row.case} | {row.threads} | {row.contender} | {row.gb_per_s:.3f} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/encode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--rows", type=int, default=1024, metavar="N", help="of the weight")
    parser.add_argument("--columns", type=int, default=14336, metavar="N", help="as the widest of Llama-3-8B")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-encode.json")
    options = parser.parse_args(arguments)
    if compiled_kernels() is None:
        sys.exit("numba is not installed, or is told not to compile: there are no compiled kernels to time")
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(options.rows, options.columns, generator=generator) * 0.02).bfloat16()
    rows = []
    for threads in (1, 2):
        for case in CASES:
            rows += measure(weight, case, threads, options.rounds)
            print(f"{threads} thread(s): {case.label}", file=sys.stderr, flush=True)
    results = {
        "shape": [options.rows, options.columns],
        "rounds": options.rounds,
        "machine": machine(RESULTS) | {name: version(name) for name in ("numba", "numpy")},
        "medians": [asdict(row) for row in rows],
    }
    save(options.results, "tools/bench/encode", results)
    print(f"\n{options.rows} x {options.columns}, medians of {options.rounds} rounds\n\n{table(rows)}")


if __name__ == "__main__":
    main()
