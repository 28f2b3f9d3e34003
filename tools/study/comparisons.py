"""`streamconv compare` with its whole list on the test beds: what it finds goes to docs/results/compare-BED.json.

A comparison that was stopped is gone on with; `--stop-after` stops it itself, once, as Ctrl-C would, and goes on. How
long each run took is kept with the results.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.results import RESULTS, load, machine, save
from tools.make_demo_base import make_demo_base
from tools.study.beds import BEDS, DEMO_BASE, Bed
from tools.study.run import described, rounded

MADE_BY = "tools/study/comparisons"
WORK = Path(".study") / "compare"
# Of a run all of whose strategies were done.
DONE = 0


@dataclass(frozen=True, slots=True)
class Amount:
    """Of text, in tokens: fewer than the study has, so that all strategies together take less than an hour."""

    evaluated: int
    length: int
    calibration: int
    gradients: int
    greedy: int


AMOUNTS: Mapping[str, Amount] = {
    "demo-kjv": Amount(4_096, 256, 4_096, 1_024, 8),
    "faq-kjv-light": Amount(8_192, 256, 8_192, 2_048, 8),
    "faq-kjv-heavy": Amount(8_192, 256, 8_192, 2_048, 8),
}


def command(bed: Bed) -> Sequence[str]:
    """The whole of what is run, but for the interpreter."""
    amount = AMOUNTS[bed.name]
    options: Mapping[str, object] = {
        "base": bed.base,
        "adapter": bed.adapter,
        "data": bed.held_out,
        "calibration": bed.calibration,
        "calibration-tokens": amount.calibration,
        "calibration-sequence-length": 512,
        "calibration-gradient-tokens": amount.gradients,
        "tokens": amount.evaluated,
        "sequence-length": amount.length,
        "greedy-tokens": amount.greedy,
        "out": WORK / bed.name,
    }
    return ["compare", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def results_path(name: str) -> Path:
    return RESULTS / f"compare-{name}.json"


def compare(bed: Bed, stop_after: float | None) -> None:
    """Run or go on with the comparison of `bed`, and keep what it finds."""
    runs_path = WORK / f"{bed.name}-runs.json"
    runs: list[dict[str, float]] = load(runs_path).get("runs", [])
    if runs and runs[-1]["exit_code"] == DONE:  # what follows is another comparison
        runs = []
    for limit in (stop_after, None) if stop_after and not runs else (None,):
        seconds, code = _run(command(bed), limit)
        runs.append({"seconds": round(seconds, 1), "exit_code": code})
        save(runs_path, MADE_BY, {"runs": runs})
    if code != DONE:
        sys.exit(f"{bed.name}: streamconv compare ended with {code}; run this again to go on")
    found = json.loads((WORK / bed.name / "comparison.json").read_text())
    save(
        results_path(bed.name),
        MADE_BY,
        {"bed": described(bed), "machine": machine(WORK), "runs": runs, "comparison": rounded(_slim(found))},
    )


def _run(words: Sequence[str], limit: float | None) -> tuple[float, int]:
    """Seconds and exit code of a run, which is interrupted after `limit` seconds."""
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "streamconv", *words]) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    return time.monotonic() - started, process.returncode


def _slim(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is of this machine's folders, or stands in the bed."""
    return {key: value for key, value in found.items() if key not in ("base", "adapter", "out", "seconds")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=__doc__)
    parser.add_argument("beds", nargs="*", help=f"{', '.join(AMOUNTS)}; all, unless some are named")
    parser.add_argument("--stop-after", type=float, help="seconds after which a first run is interrupted")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.beds) - set(AMOUNTS))
    if unknown:
        parser.error(f"{unknown[0]} is not known; there are {', '.join(AMOUNTS)}")
    for name in options.beds or AMOUNTS:
        if BEDS[name].base == DEMO_BASE and not (DEMO_BASE / "config.json").exists():
            make_demo_base(DEMO_BASE)
        compare(BEDS[name], options.stop_after)


if __name__ == "__main__":
    main()
