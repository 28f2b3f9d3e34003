"""Single flipped bits in all files of finished outputs, one at a time: what `verify` says of each.

A flip is *found* where verify ends with an error of ours (exit 7 or 3), *told* where it passes and names the file as
edited, and *missed* else: of these there must be none. Half of the flips are spread evenly over bytes, half over files,
as most bytes are those of weights.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import streamconv
from streamconv.comparison.machine import versions
from streamconv.errors import StreamconvError
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import edit_json, llama_config, save_adapter, save_base
from tools.bench.results import RESULTS, VERSIONS, save

PATH = RESULTS / "flips.json"
CALIBRATED: Mapping[str, Any] = {
    "quant": "nf4-dq",
    "merge_base": "nf4-dq",
    "calibration_tokens": 256,
    "calibration_sequence_length": 32,
    "residual_rank": 4,
    "device": "cpu",
}


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit, counted from the start of a file of an output, and what came of it: `found`, `told` or `missed`.

    `code` is the exit code that the command would have had.
    """

    output: str
    file: str
    bit: int
    end: str
    code: int


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A base with all kinds of files beside its weights, and an adapter."""
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="20KB")
    save_tokenizer(base)
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    (base / "modeling_own.py").write_text("class Model:\n    pass\n")
    (base / "LICENSE").write_text("Do as you like.\n" * 20)
    (base / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    return base, folder / "adapter"


def write_outputs(folder: Path, calibrated: bool) -> dict[str, Path]:
    """Outputs by name: 16 bit in shards, 4 bit from the same run, and, if asked for, a calibrated one with its adapter.

    The calibrated model is in one file.
    """
    base, adapter = write_inputs(folder)
    streamconv.merge(base, adapter, folder / "bf16", also=["nf4-dq"])
    found = {"bf16": folder / "bf16", "bf16/nf4-dq": folder / "bf16" / "nf4-dq"}
    if calibrated:
        text = write_text(folder / "text.txt", 300)
        streamconv.merge(base, adapter, folder / "calibrated", calibration=text, **CALIBRATED)
        found["calibrated"] = folder / "calibrated"
    return found


def files_of(out: Path) -> list[Path]:
    """All files of an output, but those of further outputs in it."""
    inside = [path.parent for path in out.glob("*/streamconv.json")]
    return sorted(path for path in out.rglob("*") if path.is_file() and path.parent not in inside)


def flips(outputs: Mapping[str, Path], count: int, seed: int) -> Iterator[Flip]:
    """`count` flips at random places, drawn from `seed`."""
    draw = random.Random(seed)
    places = [
        (name, path, path.stat().st_size * 8) for name, out in outputs.items() for path in files_of(out)
    ]
    sizes = [bits for _, _, bits in places]
    for number in range(count):
        name, path, bits = draw.choice(places) if number % 2 else draw.choices(places, sizes)[0]
        bit = draw.randrange(bits)
        end, code = try_flip(outputs[name], path, bit)
        yield Flip(name, str(path.relative_to(outputs[name])), bit, end, code)


def try_flip(out: Path, path: Path, bit: int) -> tuple[str, int]:
    """What verify says of an output with one bit of a file flipped, which is as it was afterwards."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        checked = streamconv.verify(out)
    except StreamconvError as error:
        return ("found" if error.exit_code in (3, 7) else "missed"), error.exit_code
    finally:
        path.write_bytes(whole)
    return ("told" if checked.edited == (str(path.relative_to(out)),) else "missed"), 0


def summary(done: Sequence[Flip]) -> dict[str, Any]:
    """Numbers by end, and of each file by end and exit code."""
    files: dict[str, Counter[str]] = {}
    for flip in done:
        files.setdefault(f"{flip.output}/{flip.file}", Counter())[f"{flip.end}, exit {flip.code}"] += 1
    return {
        "flips": len(done),
        "ends": dict(sorted(Counter(flip.end for flip in done).items())),
        "exits": {str(code): count for code, count in sorted(Counter(flip.code for flip in done).items())},
        "files": {name: dict(sorted(ends.items())) for name, ends in sorted(files.items())},
    }


def main() -> int:
    """Flip, save what came of it, and print it; 1 if a flip was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=PATH)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = list(flips(write_outputs(Path(folder), calibrated=True), asked.flips, asked.seed))
    found = summary(done)
    save(asked.save, "tools/flips", {"seed": asked.seed, "versions": versions(VERSIONS), **found})
    print(json.dumps(found["ends"]))
    return int("missed" in found["ends"])


if __name__ == "__main__":
    raise SystemExit(main())
