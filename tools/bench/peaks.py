"""Peak memory beside the plan's on one large weight, format by format: written, read and kept.

The weight is [8192, 28672], the widest of llama-70b, and its adapter a LoRA of rank 16. In each format it is written
from bf16; what was written is then the base of a merge to 16 bit, and of one that keeps the format.
GGUF files have the other weights of the layer, too: their readers want them. Every merge is a process of its own;
memory is anonymous, above an interpreter with torch loaded.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from streamconv.checkpoint.container import SAFETENSORS
from streamconv.formats import FORMATS, container_of
from tests.gguf.bases import fast_tokenizer
from tools.bench import methods
from tools.bench.methods import CASES, PLAIN, checked, write_adapter
from tools.bench.models import WEIGHT_STD, Model
from tools.bench.results import FOLDER, RESULTS, load, machine, save
from tools.measure import Cost, measure, torch_anon_bytes

WRITTEN, READ, KEPT = "written", "to 16 bit", "kept"
IN_GGUF = ("gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_0", "gguf:q4_k")
"""Of GGUF: numbers, blocks, and blocks in a block. Others need what one of these does."""
ON_TEXT = ("nvfp4",)
"""Formats that are written where there is a text, and hold the weights of another: this one those of nvfp4a16."""
MEASURED = tuple(
    name
    for name, each in FORMATS.items()
    if name in IN_GGUF or (container_of(each) == SAFETENSORS and name not in ON_TEXT)
)


@dataclass(frozen=True, slots=True)
class Peak:
    """One merge: `way` is WRITTEN, READ or KEPT."""

    format: str
    way: str
    peak_bytes: int
    planned_bytes: int
    wall_s: float


def write_bases(folder: Path) -> None:
    """`gguf-base`, a llama of one layer, and `base`, the same without the other two large weights; both in bf16."""
    model = Model(methods.OUT, methods.IN, heads=2, key_value_heads=1, vocabulary=320, layers=1)
    torch.manual_seed(0)
    tensors = {
        spec.name: torch.empty(spec.shape, dtype=torch.bfloat16).normal_(0, WEIGHT_STD)
        for spec in model.tensors
    }
    for base, left_out in (("gguf-base", ()), ("base", ("gate_proj.weight", "up_proj.weight"))):
        (folder / base).mkdir(parents=True)
        found = {name: tensor for name, tensor in tensors.items() if not name.endswith(left_out)}
        save_file(found, folder / base / "model.safetensors", {"format": "pt"})
        (folder / base / "config.json").write_text(json.dumps(model.config))
        (folder / base / "tokenizer.json").write_text(json.dumps(fast_tokenizer(model.vocabulary)))


def merge(base: Path, adapter: Path, out: Path, quant: str) -> Cost:
    """A merge in a process of its own; its standard output is the result as JSON."""
    shutil.rmtree(out, ignore_errors=True)
    paths = ("--base", str(base), "--adapter", str(adapter), "--out", str(out))
    how = ("--quant", quant, "--device", "cpu", "--json")
    return checked(measure((sys.executable, "-m", "streamconv", "merge", *paths, *how)))


def peaks(name: str, folder: Path, torch_bytes: int) -> Iterator[Peak]:
    """Rows of one format; what was made for them in `folder` is gone afterwards."""
    adapter, stored, out = folder / "adapter", folder / "stored", folder / "out"

    def peak(way: str, cost: Cost) -> Peak:
        planned = json.loads(cost.stdout)["planned_ram_bytes"]
        return Peak(name, way, max(0, cost.peak_anon_bytes - torch_bytes), planned, cost.wall_s)

    base = "base" if container_of(FORMATS[name]) == SAFETENSORS else "gguf-base"
    yield peak(WRITTEN, merge(folder / base, adapter, stored, name))
    yield peak(READ, merge(stored, adapter, out, "none"))
    yield peak(KEPT, merge(stored, adapter, out, "keep"))
    for used in (stored, out):
        shutil.rmtree(used)


HEADER = (
    "| format | written: peak of plan | read to 16 bit: peak of plan | kept: peak of plan |",
    "|---|--:|--:|--:|",
)


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line of the table for each format, from results as they are stored."""
    for name in dict.fromkeys(row["format"] for row in rows):
        by_way = {row["way"]: row for row in rows if row["format"] == name}
        cells = (_of_plan(by_way[way]) if way in by_way else "" for way in (WRITTEN, READ, KEPT))
        yield f"| {name} | " + " | ".join(cells) + " |"


def _of_plan(row: Mapping[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f} of {row['planned_bytes'] / 2**20:.0f} MiB"


def broken(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Merges that took more memory than was planned."""
    for row in rows:
        if row["peak_bytes"] > row["planned_bytes"]:
            yield f"{row['format']}, {row['way']}: over the plan's memory, {_of_plan(row)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/peaks", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER / "peaks", help="5 GB")
    parser.add_argument("--format", action="append", choices=MEASURED, help="only this one; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-peaks.json")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    write_bases(options.folder)
    write_adapter(options.folder / "adapter", CASES[PLAIN])
    torch_bytes, about = torch_anon_bytes(), {"machine": machine(options.folder)}
    stored = load(options.results).get("rows", ())
    print("\n".join(HEADER), flush=True)
    found = {name: [row for row in stored if row["format"] == name] for name in MEASURED}
    for name in options.format or MEASURED:
        found[name] = [asdict(peak) for peak in peaks(name, options.folder, torch_bytes)]
        rows = [row for each in found.values() for row in each]
        save(options.results, "tools/bench/peaks", {**about, "rows": rows})
        print(*lines(found[name]), flush=True)
    shutil.rmtree(options.folder)
    if over := list(broken([row for each in found.values() for row in each])):
        sys.exit("\n".join(over))


if __name__ == "__main__":
    main()
