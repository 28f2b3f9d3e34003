"""Merges, a calibration, an evaluation and an analysis on the pretend GPU and on the CPU, side by side.

    python -m tests.pretend.kinds RESULT.json [--all]

In a process of its own: what torch is told about CUDA stays told. The short set is that of the test suite.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import types
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import streamconv
from streamconv.formats import FORMATS
from streamconv.pipeline import Job, Prepared, prepare, run
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Plan, Rewrite, cell_rows
from streamconv.progress import StopRequest
from tests.gguf.bases import write_llama
from tests.models import Sizes, write_adapter, write_base
from tests.pretend.device import unknown_to_cuda
from tests.pretend.faults import seen, without_kernel
from tests.pretend.found import Found, noted, start
from tests.pretend.gpu import pretend_gpu
from tests.pretend.large import ALL_LARGE, SHORT_LARGE, calibrated_layer
from tests.pretend.methods import ALL_METHODS, SHORT_METHODS, merged_method, write_layers
from tests.pretend.models import (
    ALL_CALIBRATED,
    SHORT_CALIBRATED,
    analyzed,
    calibrated,
    evaluated,
    write_model,
)

SMALL = Sizes(hidden=256, inner=64, layers=1, vocabulary=300)
# One weight of several cells of full size, on which plans can be held to what is used.
LARGE = Sizes(hidden=2048, inner=4096, layers=1, vocabulary=96)
SHORT = ("nf4-dq", "int8", "w4a16", "gptq", "fp8", "nvfp4a16", "mlx4", "gguf:q8_0")
ROUNDINGS = ("nearest", "stochastic", "search", "adaptive")


@dataclass(frozen=True)
class Kind:
    """A merge: of a base in `source`, to `quant`."""

    quant: str
    rounding: str = "auto"
    source: str = "bfloat16"
    merge_base: str = "original"

    @property
    def name(self) -> str:
        way = f" by {self.rounding}" if self.rounding != "auto" else ""
        trained = "" if self.merge_base == "original" else f" from {self.merge_base}"
        return f"{self.source}{trained} to {self.quant}{way}"


FULL = (Kind("none"), Kind("nf4-dq", "stochastic"))


def short_kinds() -> Iterator[Kind]:
    yield Kind("none")
    for quant in SHORT:
        yield Kind(quant, "nearest")
        yield Kind(quant, "stochastic")
    yield Kind("w4a16", "search")
    yield Kind("nf4-dq", "adaptive")
    yield Kind("nf4-dq", merge_base="nf4-dq")
    for source in ("nf4-dq", "gptq", "fp8"):
        yield Kind("keep", source=source)


def all_kinds() -> Iterator[Kind]:
    plain = {"float32", "float16", "bfloat16", "gguf:f16", "gguf:bf16"}
    written = [
        name for name in FORMATS if name not in {*plain, "nvfp4"}
    ]  # which is asked for with text alone
    yield Kind("none")
    for quant in written:
        # Searches of block types are of some ten thousand operations each: one of each kind is enough.
        is_searched = quant.startswith("gguf:") and quant not in {"gguf:q4_0", "gguf:q4_k"}
        for rounding in ("stochastic",) if is_searched else ROUNDINGS:
            yield Kind(quant, rounding)
    for source in written:
        if not source.startswith("gguf:"):
            yield Kind("keep", source=source)
            yield Kind("none", source=source)
    for trained in ("nf4", "nf4-dq", "fp4-dq", "int8"):
        for quant in ("none", "nf4-dq", "w4a16"):
            yield Kind(quant, merge_base=trained)


class Workshop:
    """Bases by format, adapters and outputs, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plain = write_llama(folder / "bfloat16", SMALL, shards=1)
        self.bases = {"bfloat16": plain}
        self.adapter = write_adapter(folder / "adapter", SMALL.shapes, targets=("q_proj",))

    def base(self, name: str) -> Path:
        if name not in self.bases:
            streamconv.convert(self.bases["bfloat16"], self.folder / name, quant=name, device="cpu")
            self.bases[name] = self.folder / name
        return self.bases[name]

    def prepare(self, kind: Kind, device: str) -> Prepared:
        options = MergeOptions(
            quant=kind.quant, rounding=kind.rounding, merge_base=kind.merge_base, min_kept=0.0
        )
        return prepare(Job(str(self.base(kind.source)), str(self.adapter), options, device))

    def carry_out(self, prepared: Prepared) -> tuple[Mapping[str, bytes], float | None]:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        report = run(prepared, out, lambda done, total: None, StopRequest())
        files = (path for path in sorted(out.rglob("*")) if path.suffix in {".safetensors", ".gguf"})
        return {path.name: path.read_bytes() for path in files}, report.kept_delta


def _measured(found: Found, prepared: Prepared) -> Found:
    """`found` with what the ledger has, and the plan."""
    found.planned = prepared.plan.memory.vram
    return noted(found)


def tried(kind: Kind, shop: Workshop) -> Found:
    on_cpu = shop.carry_out(shop.prepare(kind, "cpu"))
    start()
    prepared = shop.prepare(kind, "cuda")
    on_gpu = shop.carry_out(prepared)
    found = Found(kind.name, on_cpu[0] == on_gpu[0], (on_cpu[1], on_gpu[1]))
    found.cells = _cells(prepared.plan)
    return _measured(found, prepared)


def _cells(plan: Plan) -> int:
    """Cells of the weights that are computed."""
    steps = (placed.step for shard in plan.shards for placed in shard.steps)
    computed = (step for step in steps if isinstance(step, Rewrite))
    return sum(-(-step.rows // cell_rows(plan.device, step)) for step in computed)


def at_full_size(kind: Kind, folder: Path) -> Found:
    """Memory of a merge whose cells have their full size."""
    base = write_base(folder / "large", LARGE.shapes, shards=1)
    adapter = write_adapter(folder / "large-adapter", LARGE.shapes, targets=("up_proj",), rank=8)
    options = MergeOptions(quant=kind.quant, rounding=kind.rounding, min_kept=0.0)
    prepared = prepare(Job(str(base), str(adapter), options, "cuda"))
    start()
    run(prepared, folder / "large-out", lambda done, total: None, StopRequest())
    shutil.rmtree(folder / "large-out")
    found = Found(f"{kind.name}, full cells", same=True, cells=_cells(prepared.plan))
    return _measured(found, prepared)


def without_expecttest() -> None:
    """Have torch's lists of operations import: they want a package of tests, of which nothing is used here."""
    module = types.ModuleType("expecttest")
    vars(module)["TestCase"] = unittest.TestCase
    sys.modules.setdefault("expecttest", module)


def merges(folder: Path, is_all: bool) -> Iterator[Found]:
    """Merges to all formats by all roundings."""
    shop = Workshop(folder)
    for kind in all_kinds() if is_all else short_kinds():
        yield _guarded(partial(tried, kind, shop), kind.name)


def methods(folder: Path, is_all: bool) -> Iterator[Found]:
    """Adapters of every method."""
    layers = write_layers(folder)
    for method, layer in ALL_METHODS if is_all else SHORT_METHODS:
        yield _guarded(partial(merged_method, method, layer, layers, folder), f"{method} on {layer}")


def models(folder: Path, is_all: bool) -> Iterator[Found]:
    """Whole models."""
    model = write_model(folder)
    for kind in ALL_CALIBRATED if is_all else SHORT_CALIBRATED:
        yield _guarded(partial(calibrated, kind, model, folder), kind.name)
    yield _guarded(partial(evaluated, model), "evaluated")
    if is_all:
        yield _guarded(partial(analyzed, model), "analyzed")


def full_cells(folder: Path, is_all: bool) -> Iterator[Found]:
    """Memory where cells have their full size; a layer of a large model among them."""
    for kind in FULL:
        yield _guarded(partial(at_full_size, kind, folder), kind.name)
    for large in ALL_LARGE if is_all else SHORT_LARGE:
        yield _guarded(partial(calibrated_layer, large, folder), large.name)


PARTS: Mapping[str, Callable[[Path, bool], Iterable[Found]]] = {
    "merges": merges,
    "methods": methods,
    "models": models,
    "memory": full_cells,
}


def run_part(part: str, is_all: bool) -> list[Found]:
    cells_of = 2**20 if part == "memory" else 1
    with tempfile.TemporaryDirectory() as name, pretend_gpu(cells_of=cells_of):
        return list(PARTS[part](Path(name), is_all))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # collections, of which each kind asks for one, need not go through what is imported
    results = [found for part in given.only for found in run_part(part, given.all)]
    with pretend_gpu():
        faults = seen()
    without_expecttest()  # late: torch's tests forbid to set how products of float32 are computed
    for each in results:
        each.unknown = [f"{name} of {dtype}" for name, dtype in unknown_to_cuda(each.dtypes)]
        each.dtypes = []
    found = {
        "kinds": [asdict(each) for each in results],
        "faults": {**faults, "no kernel": without_kernel()},
    }
    given.result.write_text(json.dumps(found, indent=1))


def _guarded(work: Callable[[], Found], name: str) -> Found:
    try:
        found = work()
    except Exception as error:
        found = Found(name, same=False, error=f"{type(error).__name__}: {error}")
    print(found.name, "same" if found.same else "NOT THE SAME", found.error, flush=True)
    return found


if __name__ == "__main__":
    main()
