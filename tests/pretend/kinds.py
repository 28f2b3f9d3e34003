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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

import streamconv
from streamconv.formats import FORMATS
from streamconv.pipeline import Job, Prepared, prepare, run
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Plan, Rewrite, cell_rows
from streamconv.progress import StopRequest
from tests import tiny
from tests.forward.texts import save_tokenizer, write_text
from tests.gguf.bases import write_llama
from tests.models import Sizes, write_adapter, write_base
from tests.pretend.device import unknown_to_cuda
from tests.pretend.faults import seen, without_kernel
from tests.pretend.gpu import pretend_gpu
from tests.pretend.ledger import LEDGER

SMALL = Sizes(hidden=256, inner=64, layers=1, vocabulary=300)
# One weight of several cells of full size, on which plans can be held to what is used.
LARGE = Sizes(hidden=2048, inner=4096, layers=1, vocabulary=96)
SHORT = ("nf4-dq", "int8", "w4a16", "gptq", "fp8", "nvfp4a16", "mlx4", "gguf:q8_0")
ROUNDINGS = ("nearest", "stochastic", "search")


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


@dataclass
class Found:
    """A kind, on both devices, and what the GPU was asked for."""

    name: str
    same: bool
    kept: tuple[float | None, float | None] = (None, None)
    launches: int = 0
    moved: int = 0
    cells: int = 0
    waits_submitted: Mapping[str, int] = field(default_factory=dict)
    waits: int = 0
    crossed: int = 0
    reciprocals: Mapping[str, int] = field(default_factory=dict)
    planned: int = 0
    peak: int = 0
    dtypes: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    error: str = ""


def short_kinds() -> Iterator[Kind]:
    yield Kind("none")
    for quant in SHORT:
        yield Kind(quant, "nearest")
        yield Kind(quant, "stochastic")
    yield Kind("w4a16", "search")
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
    """`found` with what the ledger has."""
    found.planned = prepared.plan.memory.vram
    return _noted(found)


def _noted(found: Found) -> Found:
    found.launches, found.moved, found.waits = LEDGER.launches, LEDGER.moved, sum(LEDGER.waits.values())
    found.waits_submitted = {
        f"{why}, {where}": count for (why, where), count in LEDGER.waits_submitted.items()
    }
    found.crossed = sum(LEDGER.crossed.values())
    found.reciprocals = dict(LEDGER.reciprocals)
    found.peak = LEDGER.peak
    found.dtypes = sorted(LEDGER.dtypes)
    return found


def _start() -> None:
    gc.collect()
    LEDGER.reset()


def tried(kind: Kind, shop: Workshop) -> Found:
    on_cpu = shop.carry_out(shop.prepare(kind, "cpu"))
    _start()
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
    _start()
    run(prepared, folder / "large-out", lambda done, total: None, StopRequest())
    shutil.rmtree(folder / "large-out")
    found = Found(f"{kind.name}, full cells", same=True, cells=_cells(prepared.plan))
    return _measured(found, prepared)


# -- whole models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    base: Path
    adapter: Path
    text: Path


def write_model(folder: Path) -> Model:
    base = tiny.save_base(folder / "model", tiny.llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    tiny.save_adapter(folder / "model-adapter", base, lora)
    return Model(base, folder / "model-adapter", write_text(folder / "text.txt", 300))


def calibrated(model: Model, folder: Path) -> Found:
    """Twice on the GPU: the same bytes."""
    files = []
    _start()
    for number in range(2):
        out = folder / f"calibrated-{number}"
        streamconv.merge(
            model.base,
            model.adapter,
            out,
            quant="nf4-dq",
            merge_base="nf4-dq",
            calibration=model.text,
            calibration_tokens=160,
            calibration_sequence_length=32,
            calibration_gradient_tokens=0,
            device="cuda",
        )
        files.append((out / "model.safetensors").read_bytes())
    return _noted(Found("calibrated, twice", files[0] == files[1]))


def evaluated(model: Model) -> Found:
    _start()
    losses = [
        streamconv.evaluate(
            model.base, data=model.text, sequence_length=32, tokens=256, device=device
        ).perplexity
        for device in ("cpu", "cuda")
    ]
    return _noted(Found("evaluated", abs(losses[0] - losses[1]) <= 1e-6 * losses[0]))


def analyzed(model: Model) -> Found:
    _start()
    kept = [
        streamconv.analyze(model.base, model.adapter, device=device).total["F"].formats["nf4-dq"]
        for device in ("cpu", "cuda")
    ]
    ratio = kept[0].delta_to_step
    return _noted(Found("analyzed", abs(ratio - kept[1].delta_to_step) <= 1e-6 * ratio))


def without_expecttest() -> None:
    """Have torch's lists of operations import: they want a package of tests, of which nothing is used here."""
    module = types.ModuleType("expecttest")
    vars(module)["TestCase"] = unittest.TestCase
    sys.modules.setdefault("expecttest", module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # collections, of which each kind asks for one, need not go through what is imported
    results: list[Found] = []
    with tempfile.TemporaryDirectory() as name, pretend_gpu():
        shop = Workshop(Path(name))
        kinds = all_kinds() if given.all else short_kinds()
        results.extend(_guarded(partial(tried, kind, shop), kind.name) for kind in kinds)
        model = write_model(Path(name))
        results.append(_guarded(partial(calibrated, model, Path(name)), "calibrated, twice"))
        results.append(_guarded(partial(evaluated, model), "evaluated"))
        if given.all:
            results.append(_guarded(partial(analyzed, model), "analyzed"))
    with tempfile.TemporaryDirectory() as name, pretend_gpu(cells_of=2**20):
        results.extend(_guarded(partial(at_full_size, kind, Path(name)), kind.name) for kind in FULL)
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
