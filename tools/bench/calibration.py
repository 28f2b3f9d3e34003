"""Memory of a calibrated merge does not grow with the number of layers, and stays within the plan.

Models of random weights with layers of 210 MB are merged to nf4-dq with calibration text, a few layers and many.
`down_proj`, whose 32,768 inputs would ask for 65,536 tokens, stays in 16 bit, and so does `up_proj`, which is another
`gate_proj`, so that this takes minutes a layer less; their weights go through memory all the same. What outputs count
for is not measured here: of 32,768, it takes gigabytes.
"""

import argparse
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from streamconv.pipeline import build_job, prepare
from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.bench.merge import checked, drop_cache, streamconv
from tools.bench.models import Model
from tools.bench.results import FOLDER, RESULTS, machine, save
from tools.measure import folder_bytes, measure, torch_anon_bytes

WIDE = Model(1024, 32768, heads=8, key_value_heads=8, vocabulary=1024, layers=1)
SMALL = Model(256, 512, heads=2, key_value_heads=1, vocabulary=1024, layers=1)
SHAPES: Mapping[str, Model] = {"wide": WIDE, "small": SMALL}
LENGTH = 256
IGNORED = ("down_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Peak:
    """One calibrated merge. `planned_bytes` and `above_torch_bytes` are above the interpreter with torch loaded."""

    layers: int
    layer_bytes: int
    input_bytes: int
    output_bytes: int
    tokens: int
    wall_s: float
    cpu_s: float
    above_torch_bytes: int
    planned_bytes: int


def make(folder: Path, model: Model, tokens: int) -> None:
    """A base with its tokenizer, an adapter, and text of so many tokens, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_checkpoint.check_disk(folder, int(2.5 * model.nbytes))
    make_checkpoint.make(folder, model, parse_size("5GB"), rank=8, seed=0)
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(model.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "base")
    drawn = random.Random(0).choices(range(model.vocabulary), k=tokens)
    (folder / "text.txt").write_text(" ".join(f"w{token}" for token in drawn))


def peak_of(folder: Path, model: Model, tokens: int, torch_bytes: int) -> Peak:
    """The merge of what lies in `folder`, calibrated, in a process of its own."""
    base, adapter, text, out = (folder / name for name in ("base", "adapter", "text.txt", "out"))
    job = build_job(
        base,
        adapter,
        quant="nf4-dq",
        calibration=text,
        calibration_tokens=tokens,
        calibration_sequence_length=LENGTH,
        calibration_gradient_tokens=0,
        ignore=IGNORED,
        device="cpu",
        max_ram="64GiB",
    )
    planned = prepare(job).plan.peak_ram
    lengths = ("--calibration-tokens", str(tokens), "--calibration-sequence-length", str(LENGTH))
    one_sided = ("--calibration-gradient-tokens", "0")
    inputs = ("--base", base, "--adapter", adapter, "--calibration", text, *lengths, *one_sided)
    ignored = [word for name in IGNORED for word in ("--ignore", name)]
    drop_cache(folder)
    command = streamconv("merge", *inputs, "--quant", "nf4-dq", *ignored, "--max-ram", "64GiB", "-o", out)
    cost = checked(measure(command), f"the calibrated merge of {model.layers} layers")
    one = replace(model, layers=1).nbytes - replace(model, layers=0).nbytes
    return Peak(
        layers=model.layers,
        layer_bytes=one,
        input_bytes=folder_bytes(base),
        output_bytes=folder_bytes(out),
        tokens=tokens,
        wall_s=cost.wall_s,
        cpu_s=cost.cpu_s,
        above_torch_bytes=max(0, cost.peak_anon_bytes - torch_bytes),
        planned_bytes=planned,
    )


HEADER = ("| layers | read | wall | peak above torch | planned |", "|--:|--:|--:|--:|--:|")


def row(peak: Mapping[str, Any]) -> str:
    """One line of the table, from a result as it is stored."""
    cells = (
        str(peak["layers"]),
        f"{peak['input_bytes'] / 1e9:.1f} GB",
        f"{peak['wall_s']:.0f} s",
        f"{peak['above_torch_bytes'] / 2**20:.0f} MiB",
        f"{peak['planned_bytes'] / 2**20:.0f} MiB",
    )
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/calibration", description=__doc__)
    parser.add_argument("--layers", default="4,16", help="numbers of layers, one model each")
    parser.add_argument("--model", choices=SHAPES, default="wide")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=FOLDER / "calibration")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-calibration.json")
    options = parser.parse_args(arguments)
    torch_bytes, peaks = torch_anon_bytes(), []
    for layers in map(int, options.layers.split(",")):
        model = replace(SHAPES[options.model], layers=layers)
        make(options.folder, model, options.tokens)
        print(f"calibrating {layers} layers, {model.nbytes / 1e9:.1f} GB", file=sys.stderr, flush=True)
        peaks.append(asdict(peak_of(options.folder, model, options.tokens, torch_bytes)))
        about = {"machine": machine(options.folder), "model": options.model, "peaks": peaks}
        save(options.results, "tools/bench/calibration", about)
        shutil.rmtree(options.folder)
    print("\n".join((*HEADER, *map(row, peaks))), flush=True)


if __name__ == "__main__":
    main()
