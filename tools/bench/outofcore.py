"""The proof that memory does not depend on the model: 20 GB with the layer widths of a 70B model, in 1.5 GiB.

The whole process, interpreter and torch included, runs inside a limit that ends it if it takes more; that the limit
holds is tried out first. `RssAnon` is what the process itself cannot give back, sampled; `peak` is what the kernel
counted, where it says, with the cache of the files read and written: that fills whatever the limit leaves.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.bench.limits import Limit, memory_limit
from tools.bench.merge import checked, drop_cache, streamconv
from tools.bench.models import MODELS
from tools.bench.results import FOLDER, RESULTS, machine, save
from tools.measure import folder_bytes, measure, torch_anon_bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """One merge inside the limit; `anon_bytes` is the highest RssAnon seen, of the whole process."""

    output: str
    input_bytes: int
    output_bytes: int
    wall_s: float
    cpu_s: float
    anon_bytes: int
    anon_above_torch_bytes: int
    counted_peak_bytes: int | None


def prove(folder: Path, output: str, limit: Limit, torch_bytes: int) -> Proof:
    """Merge `folder/base` to `output` (`bf16` or a format), which is removed again."""
    base, out = folder / "base", folder / "out"
    quant = "keep" if output == "bf16" else output
    inputs = ("--base", base, "--adapter", folder / "adapter")
    shutil.rmtree(out, ignore_errors=True)
    drop_cache(folder)
    command = streamconv("merge", *inputs, "--quant", quant, "-o", out)
    cost = checked(measure(limit.wrap(command)), f"the merge to {output} inside {limit.name}")
    written = folder_bytes(out)
    shutil.rmtree(out)
    return Proof(
        output=output,
        input_bytes=folder_bytes(base),
        output_bytes=written,
        wall_s=cost.wall_s,
        cpu_s=cost.cpu_s,
        anon_bytes=cost.peak_anon_bytes,
        anon_above_torch_bytes=max(0, cost.peak_anon_bytes - torch_bytes),
        counted_peak_bytes=limit.peak(),
    )


HEADER = (
    "| output | read | written | wall | GB/s | RssAnon | above torch | peak |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
)


def row(proof: Mapping[str, Any]) -> str:
    """One line of the table, from a result as it is stored."""
    counted = proof["counted_peak_bytes"]
    cells = (
        proof["output"],
        f"{proof['input_bytes'] / 1e9:.1f} GB",
        f"{proof['output_bytes'] / 1e9:.1f} GB",
        f"{proof['wall_s']:.0f} s",
        f"{proof['input_bytes'] / proof['wall_s'] / 1e9:.2f}",
        f"{proof['anon_bytes'] / 2**20:.0f} MiB",
        f"{proof['anon_above_torch_bytes'] / 2**20:.0f} MiB",
        "not counted" if counted is None else f"{counted / 2**20:.0f} MiB",
    )
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/outofcore", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=parse_size("21GB"), help="rounded to whole layers")
    parser.add_argument("--limit", type=parse_size, default=parse_size("1.5GiB"))
    parser.add_argument("--outputs", default="nf4-dq,bf16", help="formats, one after the other")
    parser.add_argument(
        "--model", choices=MODELS, default="llama-70b", help="whose widths the checkpoint has"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER / "outofcore")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there for another run")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-outofcore.json")
    options = parser.parse_args(arguments)
    folder, model = options.folder, MODELS[options.model].of_size(options.size)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        make_checkpoint.check_disk(folder, int(2.1 * model.nbytes))
        print(
            f"making {model.layers} layers, {model.nbytes / 1e9:.1f} GB, in {folder}",
            file=sys.stderr,
            flush=True,
        )
        make_checkpoint.make(folder, model, parse_size("5GB"), rank=16, seed=0)
    torch_bytes, proofs = torch_anon_bytes(), []
    about = {
        "machine": machine(folder),
        "model": options.model,
        "layers": model.layers,
        "limit_bytes": options.limit,
    }
    for output in options.outputs.split(","):
        with memory_limit(options.limit) as limit:  # a new one each: peaks are not reset
            print(f"merging to {output} inside {limit.name}", file=sys.stderr, flush=True)
            proofs.append(asdict(prove(folder, output, limit, torch_bytes)))
            about["limited_by"] = limit.name
        save(options.results, "tools/bench/outofcore", {**about, "proofs": proofs})
    if not options.keep:
        shutil.rmtree(folder)
    print(f"\n{about['limited_by']}, {options.limit / 2**20:.0f} MiB\n")
    print("\n".join((*HEADER, *map(row, proofs))), flush=True)


if __name__ == "__main__":
    main()
