"""The study: every strategy on every bed, written by `streamconv merge` and judged by stock transformers.

What is done is kept in docs/results/study-BED.json after every step, and not done again; `--anew STRATEGY` forgets it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import Tensor

from tools.bench.results import RESULTS, load, machine, save
from tools.make_demo_base import make_demo_base
from tools.measure import Cost, measure
from tools.perplexity import Subject, be_quiet, dequantized, read_windows
from tools.study import synthetic
from tools.study.beds import (
    BEDS,
    BY_SIZE,
    DEMO_BASE,
    FACTORS,
    MERGED,
    OPENED,
    REFERENCE,
    SCALED,
    Bed,
    Merged,
    Opened,
    scaled,
)
from tools.study.judge import judge, states_of
from tools.study.weights import Layer, compare, describe, layers, read_tensors

WORK = Path(".study")
MADE_BY = "tools/study/run"
SYNTHETIC, SIZES = "synthetic", "sizes"
NAMES = (SYNTHETIC, SIZES, *BEDS)


def study(bed: Bed, wanted: Callable[[str], bool], tell: Callable[[str], None]) -> None:
    """Fill in what is missing in the results of `bed`."""
    path = results_path(bed)
    results = load(path) or {"bed": described(bed), "machine": {}, "rows": {}, "weights": []}
    work = WORK / bed.name
    windows = read_windows(bed.base, bed.held_out, bed.windows, bed.tokens)
    every: tuple[Opened | Merged, ...] = (*OPENED, *MERGED)
    rows = [row for row in every if wanted(row.name) and row.name not in results["rows"]]
    if not rows and results["weights"]:
        return
    reference, head = states_of(bed.trained, windows, work / "T.pt")
    adapted = _adapted(bed, work)
    if not results["weights"]:
        tell(f"{bed.name}: what nearest rounding does to every weight")
        results["weights"] = [rounded(describe(layer)) for layer in adapted.values()]
        save(path, MADE_BY, results)
    for row in rows:
        tell(f"{bed.name}: {row.label}")
        found = _opened(bed, row, windows, reference, head) if isinstance(row, Opened) else None
        if isinstance(row, Merged):
            found = _merged(bed, row, windows, reference, head, adapted)
        results["machine"] = machine(work)
        results["rows"][row.name] = {**rounded(found), "commit": results["machine"]["commit"]}
        save(path, MADE_BY, results)


def results_path(bed: Bed) -> Path:
    return RESULTS / f"study-{bed.name}.json"


def _adapted(bed: Bed, work: Path) -> Mapping[str, Layer]:
    base_nf4 = work / "base-nf4"
    if not base_nf4.exists():
        streamconv("convert", "--base", str(bed.base), "-o", str(base_nf4), "--quant", "nf4-dq")
    return {layer.name: layer for layer in layers(bed.base, base_nf4, bed.adapter)}


def _opened(bed: Bed, row: Opened, windows: Tensor, reference: Tensor, head: Tensor) -> dict[str, Any]:
    subject = Subject(bed.base, bed.adapter if row.adapter else None, row.load_in_nf4_dq)
    states = reference if row is REFERENCE else states_of(subject, windows)[0]
    return {"label": row.label, **asdict(judge(states, reference, head, windows))}


def _merged(
    bed: Bed,
    row: Merged,
    windows: Tensor,
    reference: Tensor,
    head: Tensor,
    adapted: Mapping[str, Layer],
) -> dict[str, Any]:
    """Write the output of `row`, judge it and remove it."""
    out = WORK / bed.name / row.name
    options = [*row.options, *(bed.calibration_options if row.calibrated else ())]
    shutil.rmtree(out, ignore_errors=True)
    cost = streamconv(
        "merge", "--base", str(bed.base), "--adapter", str(bed.adapter), "-o", str(out), *options
    )
    report = json.loads(cost.stdout)
    found = {
        "label": row.label,
        "target": row.target,
        "options": options,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "kept_delta": report["kept_delta"],
        "not_exact": not_exact(out),
        **compare(adapted, out, row.target),
        **asdict(judge(states_of(Subject(out), windows)[0], reference, head, windows)),
    }
    if row.residual:
        # Of the file alone; the row's own verdict is that with the adapter.
        found["alone"] = {key: found[key] for key in ("losses", "kl", "agreement")}
        found["residual"] = report["residual"]
        states = states_of(Subject(out, out / "residual"), windows)[0]
        found |= asdict(judge(states, reference, head, windows))
    shutil.rmtree(out)
    return found


def not_exact(out: Path) -> list[str]:
    """Modules of an nf4 output whose weights bitsandbytes and streamconv decode differently, in any bit."""
    dense = out.with_name(f"{out.name}-dense")
    shutil.rmtree(dense, ignore_errors=True)
    streamconv("convert", "--base", str(out), "-o", str(dense), "--quant", "none")
    ours = read_tensors(dense)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    wrong = [
        name
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
        and not torch.equal(dequantized(module), ours[f"{name}.weight"])
    ]
    shutil.rmtree(dense)
    return wrong


def streamconv(*arguments: str) -> Cost:
    command = [sys.executable, "-m", "streamconv", *arguments, "--json"]
    cost = measure(command)
    if cost.exit_code:
        sys.exit(f"{cost.stderr}\n`{' '.join(command)}` ended with exit {cost.exit_code}")
    return cost


def described(bed: Bed) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(bed).items()}


def rounded(value: Any) -> Any:
    """Numbers to seven digits: more would only fill the file."""
    match value:
        case float():
            return float(f"{value:.7g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list():
            return [rounded(item) for item in value]
        case _:
            return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/study/run", description=__doc__)
    parser.add_argument("subjects", nargs="*", help=f"{', '.join(NAMES)}; all, unless some are named")
    parser.add_argument(
        "--threads", type=int, default=2, help="of the judge; results depend on it in the last bits"
    )
    parser.add_argument("--only", action="append", default=[], help="a strategy; repeatable")
    parser.add_argument("--anew", action="append", default=[], help="a strategy to measure again; repeatable")
    options = parser.parse_args(arguments)
    if unknown := set(options.subjects) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    be_quiet()
    torch.set_num_threads(options.threads)
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {what}", flush=True)

    chosen = options.subjects or NAMES
    if any(name in chosen and bed.base == DEMO_BASE for name, bed in BEDS.items()):
        make_demo_base(DEMO_BASE)
    if SYNTHETIC in chosen:
        _synthetic(options.anew, tell)
    if SIZES in chosen:
        _sizes(tell)
    for bed in (bed for name, bed in BEDS.items() if name in chosen):
        _forget(bed, options.anew)
        study(bed, lambda name: not options.only or name in options.only, tell)


def _synthetic(anew: Sequence[str], tell: Callable[[str], None]) -> None:
    path = RESULTS / f"study-{SYNTHETIC}.json"
    if path.exists() and SYNTHETIC not in anew:
        return
    tell("synthetic layers")
    found = {"dead_zone": synthetic.dead_zone(), "compensated": synthetic.compensated()}
    save(path, MADE_BY, {"machine": machine(RESULTS), "seeds": list(synthetic.SEEDS), **rounded(found)})


def _sizes(tell: Callable[[str], None]) -> None:
    """KL of what is rounded without text, for one update in several sizes."""
    path = RESULTS / f"study-{SIZES}.json"
    results = load(path) or {"machine": {}, "sizes": {}}
    for factor in FACTORS:
        if str(factor) in results["sizes"]:
            continue
        tell(f"{SCALED.name}: {factor} times the update")
        bed = scaled(factor, WORK)
        work = WORK / f"{bed.name}-work"
        windows = read_windows(bed.base, bed.held_out, bed.windows, bed.tokens)
        reference, head = states_of(bed.trained, windows, work / "T.pt")
        adapted = _adapted(bed, work)
        found: dict[str, Any] = {"ratios": [describe(layer)["ratio"] for layer in adapted.values()]}
        for row in BY_SIZE:
            measured = _merged(bed, row, windows, reference, head, adapted)
            found[row.name] = {"kept": measured["kept"], "kl": measured["kl"]}
        results["sizes"][str(factor)] = rounded(found)
        save(path, MADE_BY, results | {"machine": machine(work)})


def _forget(bed: Bed, names: Sequence[str]) -> None:
    if results := load(results_path(bed)):
        rows = {name: row for name, row in results["rows"].items() if name not in names}
        save(results_path(bed), MADE_BY, results | {"rows": rows})


if __name__ == "__main__":
    main()
