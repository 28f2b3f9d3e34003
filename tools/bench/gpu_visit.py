"""All that a card borrowed for ten minutes can show, in one result file, which is whole after every part.

Every part runs in a process of its own, ended when its time is up: a GPU that hangs or fails costs one part. With --dry
all is small, on the CPU, in this process: it shows that the script works, and nothing of a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import streamconv
from streamconv.errors import ResourceError
from streamconv.planning.devices import resolve_device
from streamconv.planning.options import MergeOptions
from streamconv.progress import anonymous_bytes
from streamconv.running.streams import CudaStream
from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.bench.calibration import make as make_texts
from tools.bench.gpu import card, disk_rates, pcie_rates
from tools.bench.gpu_merge import merge
from tools.bench.models import MODELS, Model
from tools.bench.results import FOLDER, RESULTS, machine, save

SMALL = replace(MODELS["tiny"], layers=1)
LARGE = replace(MODELS["llama-70b"], layers=2, vocabulary=1024)
FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "w4a16", "w8a16", "gptq", "awq")
ROUNDINGS = ("nearest", "stochastic", "search")
TRIAL = Model(128, 128, heads=1, key_value_heads=1, vocabulary=256, layers=1)
TOKENS = 2048
# Of these ten minutes one is left for what comes before and after.
WHOLE_S = 540.0


@dataclass(frozen=True, slots=True)
class Visit:
    """Folder with a small base, its adapter and a text; the device; and whether this is a trial."""

    folder: Path
    device: str
    dry: bool

    @property
    def base(self) -> str:
        return str(self.folder / "small/base")

    @property
    def adapter(self) -> str:
        return str(self.folder / "small/adapter")

    @property
    def text(self) -> str:
        return str(self.folder / "small/text.txt")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 32 if self.dry else 128

    @property
    def tokens(self) -> int:
        """Tokens of a text, as many as two for each input of the widest weight."""
        return 256 if self.dry else 1024

    @contextmanager
    def out(self) -> Iterator[Path]:
        """A folder for outputs, gone afterwards."""
        folder = self.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


Found = dict[str, Any]


def is_same(one: Path, other: Path) -> bool:
    """Whether two outputs have the same weights, byte for byte."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def links(visit: Visit) -> Found:
    """Bytes a second over PCIe and of the disk."""
    nbytes = 2**20 if visit.dry else 2**28
    to_device, from_device = pcie_rates(torch.device(visit.device), nbytes)
    read, write = disk_rates(visit.folder / "small")
    return {"to_device": to_device, "from_device": from_device, "read": read, "write": write}


def same_bytes(visit: Visit) -> Found:
    """Whether every format and rounding gives the bytes of the CPU; a reason where one does not run."""
    found: Found = {}
    formats, roundings = (FORMATS[:1], ROUNDINGS[:1]) if visit.dry else (FORMATS, ROUNDINGS)
    for quant in formats:
        for rounding in roundings:
            with visit.out() as out:
                try:
                    for name in ("cpu", visit.device):
                        place = str(out / f"on {name}")
                        streamconv.convert(visit.base, place, quant=quant, rounding=rounding, device=name)
                    found[f"{quant} {rounding}"] = is_same(out / "on cpu", out / f"on {visit.device}")
                except streamconv.StreamconvError as error:
                    found[f"{quant} {rounding}"] = str(error)
    return found


def waits(visit: Visit) -> Found:
    """Merges with CUDA told to refuse whatever would have the host wait while a tile is submitted."""
    submitted = [0]
    submit = CudaStream.submit

    def watched(stream: CudaStream, work: Callable[[], None]) -> None:
        submitted[0] += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            submit(stream, work)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    found: Found = {}
    for quant, merge_base in (("keep", "original"), ("nf4", "original"), ("nf4-dq", "nf4-dq")):
        with visit.out() as out, mock.patch.object(CudaStream, "submit", watched):
            options = {"quant": quant, "merge_base": merge_base, "min_kept": 0.0, "device": visit.device}
            try:
                streamconv.merge(visit.base, visit.adapter, str(out), **options)  # type: ignore[arg-type]
                found[f"{quant} from {merge_base}"] = "did not wait"
            except RuntimeError as error:
                found[f"{quant} from {merge_base}"] = str(error).splitlines()[0]
    return {**found, "submitted": submitted[0]}


def calibrated(visit: Visit) -> Found:
    """The same calibrated merge twice; whether the bytes are equal."""
    with visit.out() as out:
        seconds = []
        for name in ("once", "twice"):
            started = time.perf_counter()
            streamconv.merge(
                visit.base,
                visit.adapter,
                str(out / name),
                quant="nf4",
                rounding="feedback",
                calibration=visit.text,
                device=visit.device,
                min_kept=0.0,
                calibration_tokens=visit.tokens,
                calibration_sequence_length=visit.length,
            )
            seconds.append(time.perf_counter() - started)
        return {"equal": is_same(out / "once", out / "twice"), "seconds": seconds}


def evaluated(visit: Visit) -> Found:
    """Perplexity there and on the CPU."""
    found = {
        device: streamconv.evaluate(
            visit.base,
            data=visit.text,
            device=device,
            sequence_length=visit.length,
            tokens=visit.tokens,
        )
        for device in ("cpu", visit.device)
    }
    return {name: {"perplexity": each.perplexity, "seconds": each.seconds} for name, each in found.items()}


def analyzed(visit: Visit) -> Found:
    """Kept share of the update there and on the CPU."""
    found = {
        device: streamconv.analyze(visit.base, visit.adapter, formats=["nf4"], device=device)
        for device in ("cpu", visit.device)
    }
    return {
        name: {"advice": [str(each) for each in analysis.advice], "seconds": analysis.seconds}
        for name, analysis in found.items()
    }


def compared(visit: Visit) -> Found:
    """A comparison with the speed of each model, whose process must find memory that this one had."""
    with visit.out() as out:
        found = streamconv.compare(
            visit.base,
            visit.adapter,
            str(out),
            data=visit.text,
            strategies=["nearest-T"] if visit.dry else ["nearest-T", "stochastic-T"],
            device=visit.device,
            sequence_length=visit.length,
            tokens=visit.tokens,
            speed=not visit.dry,
            speed_tokens=16,
        )
        return {"rows": [str(row) for row in found.rows]}


def large(visit: Visit) -> Found:
    """Two layers as wide as those of 70B to nf4-dq, to that from T stochastically, and to w4a16: time and memory."""
    place, model = visit.folder / "large", TRIAL if visit.dry else LARGE
    if not (place / "base").is_dir():
        make_checkpoint.check_disk(place.parent, int(1.5 * model.nbytes))
        make_checkpoint.make(place, model, parse_size("5GB"), rank=16, seed=0)
    found: Found = {"input_bytes": model.nbytes}
    kinds = (
        ("nf4-dq", "original", "auto"),
        ("nf4-dq", "nf4-dq", "stochastic"),
        ("w4a16", "original", "nearest"),
    )
    for quant, merge_base, rounding in kinds[: 1 if visit.dry else None]:
        with visit.out() as out:
            options = MergeOptions(quant=quant, merge_base=merge_base, rounding=rounding, min_kept=0.0)
            if visit.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            before = anonymous_bytes(pinned=True) - anonymous_bytes()
            merged = merge(place / "base", place / "adapter", out, options, visit.device)
            shared = anonymous_bytes(pinned=True) - anonymous_bytes() - before
            found[f"{quant} {rounding} from {merge_base}"] = {
                "seconds": merged.seconds,
                "bytes_per_s": merged.read_bytes / merged.seconds,
                "planned_vram_bytes": merged.planned_vram_bytes,
                "peak_vram_bytes": merged.peak_vram_bytes,
                "reserved_vram_bytes": merged.reserved_vram_bytes,
                "planned_ram_bytes": merged.planned_ram_bytes,
                "shared_bytes_left": shared,
                "lanes": merged.lanes,
            }
    return found


def old_architecture(visit: Visit) -> Found:
    """A GPU that this torch has no code for, which is made up: it must be refused by name."""
    del visit
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_device_name", return_value="GTX 1080"),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(6, 1)),
        mock.patch.object(torch.cuda, "get_arch_list", return_value=["sm_75", "sm_90"]),
    ):
        try:
            resolve_device("cuda")
        except ResourceError as error:
            return {"refused": str(error), "auto": resolve_device("auto").name}
    return {"refused": None}


@dataclass(frozen=True, slots=True)
class Part:
    run: Callable[[Visit], Found]
    limit_s: float


PARTS: Mapping[str, Part] = {
    "old architecture": Part(old_architecture, 20),
    "links": Part(links, 40),
    "same bytes": Part(same_bytes, 100),
    "waits": Part(waits, 40),
    "calibrated twice": Part(calibrated, 80),
    "evaluated": Part(evaluated, 40),
    "analyzed": Part(analyzed, 40),
    "70B layers": Part(large, 150),
    "compared": Part(compared, 90),
}
"""What is done, in order, and the seconds that each may take; all of it ends after WHOLE_S."""


def here(name: str, visit: Visit, limit_s: float) -> Found:
    """The part in this process."""
    del limit_s
    return PARTS[name].run(visit)


def apart(name: str, visit: Visit, limit_s: float) -> Found:
    """The part in a process of its own, and why there is nothing of it where it failed or its time was up."""
    command = [sys.executable, "-m", "tools.bench.gpu_visit", "--part", name, "--folder", str(visit.folder)]
    command += ["--device", visit.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit_s:.0f} s"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}", "said": done.stderr[-2000:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def visit_all(visit: Visit, results: Path, run: Callable[[str, Visit, float], Found]) -> Found:
    """Every part in turn; `results` is written after each."""
    started = time.monotonic()
    about = {"machine": machine(visit.folder), "card": card(torch.device(visit.device)), "dry": visit.dry}
    parts: Found = {}
    for name, part in PARTS.items():
        left = WHOLE_S - (time.monotonic() - started)
        begun = time.monotonic()
        found = run(name, visit, min(part.limit_s, left)) if left > 0 else {"failed": "no time was left"}
        parts[name] = {"wall_s": time.monotonic() - begun, **found}
        save(results, "tools/bench/gpu_visit", {**about, "parts": parts})
        print(f"{name}: {parts[name].get('failed', 'done')}", file=sys.stderr, flush=True)
    return parts


def make_inputs(visit: Visit) -> None:
    """A small base with its tokenizer and adapter, and a text."""
    place = visit.folder / "small"
    shutil.rmtree(place, ignore_errors=True)
    make_texts(place, TRIAL if visit.dry else SMALL, TOKENS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/gpu_visit", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU: a trial of this script")
    parser.add_argument("--folder", type=Path, default=FOLDER / "gpu-visit")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-gpu-visit.json")
    parser.add_argument("--part", choices=PARTS, help="this one alone, to standard output")
    given = parser.parse_args(arguments)
    visit = Visit(given.folder, "cpu" if given.dry else given.device, given.dry)
    if given.part:
        print(json.dumps(PARTS[given.part].run(visit)))
        return
    if not given.dry and not torch.cuda.is_available():
        sys.exit(
            "tools/bench/gpu_visit: torch sees no CUDA device, so nothing was measured; --dry tries the script"
        )
    visit.folder.mkdir(parents=True, exist_ok=True)
    make_inputs(visit)
    parts = visit_all(visit, given.results, here if given.dry else apart)
    shutil.rmtree(visit.folder, ignore_errors=True)
    if failed := [name for name, found in parts.items() if "failed" in found]:
        sys.exit(f"tools/bench/gpu_visit: not done: {', '.join(failed)}; see {given.results}")


if __name__ == "__main__":
    main()
