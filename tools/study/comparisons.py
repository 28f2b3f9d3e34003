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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.comparison.bootstrap import Estimate, perplexity_difference, ratio
from streamconv.comparison.recommendation import recommend
from streamconv.comparison.result import Failure, Row, numbers_of
from tools.bench.results import RESULTS, load, machine, save
from tools.make_demo_base import make_demo_base
from tools.study.beds import (
    BEDS,
    DEMO_BASE,
    NOT_MEASURED,
    Bar,
    Bed,
    Results,
    described,
    rounded,
    shown,
    table,
)

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


# Of the list of `streamconv compare`: in the format that training had the base in.
NF4_OF_T = ("nearest-T", "stochastic-T", "search-T", "feedback-T", "feedback-T-delta")


def compared_bars(name: str, results: Results) -> Iterator[Bar]:
    """Of what `streamconv compare` found: files of T for which bitsandbytes' own format is chosen, and others."""
    label = BEDS[name].label
    rows = {
        row["name"]: row["numbers"] for row in results.get("comparison", {}).get("rows", ()) if row["numbers"]
    }
    for other in ("gptq-T", "awq-T"):
        claim = (
            f"{label}: the best nf4-dq file of T has a lower KL to T than {other}, at no more than 0.05 bits more, and "
            "a perplexity that is not above beyond the interval"
        )
        if other not in rows or "feedback-T" not in rows:
            yield Bar(claim, None, "not measured yet")
            continue
        best = min((each for each in NF4_OF_T if each in rows), key=lambda each: rows[each]["kl"]["value"])
        ours, theirs = rows[best], rows[other]
        share = ratio(ours["kl_by_sequence"], theirs["kl_by_sequence"])
        gap = perplexity_difference(ours["losses"], theirs["losses"])
        bits = ours["bits_per_weight"] - theirs["bits_per_weight"]
        passes = share.high < 1 and bits <= 0.05 and gap.low <= 0
        found = f"{best}: KL {shown(share, 3)} of it, {bits:+.2f} bits, perplexity {shown(gap, 3)} more"
        yield Bar(claim, passes, found)
    if name == "demo-kjv":
        claim = f"{label}: compare takes under 60 minutes on 2 cores, stopped and gone on with once"
        runs = results.get("runs", [])
        minutes = sum(run["seconds"] for run in runs) / 60
        said = f"{minutes:.0f} min in {len(runs)} runs"
        yield (
            Bar(claim, minutes < 60 and len(runs) > 1, said) if runs else Bar(claim, None, "not measured yet")
        )


def compared_block(_: Mapping[str, Results], others: Results) -> str:
    parts = [_compared(BEDS[name].label, found) for name, found in others["compared"].items() if found]
    return "\n\n".join(parts) or NOT_MEASURED


def _compared(label: str, results: Results) -> str:
    columns = (
        "strategy",
        "what",
        "bits",
        "perplexity",
        "to T",
        "KL to T, 1/1000 nat",
        "top-1",
        "greedy",
        "kept",
        "load, MB",
        "tokens/s",
        "merge, s",
    )
    found = results["comparison"]
    rows, others = [], []
    for row in found["rows"]:
        what = row["label"] if row["quant"] in (None, "none") else f"{row['quant']}: {row['label']}"
        if row["numbers"] is None:
            others.append(f"- `{row['name']}`: {row['reason'] or row['failure']['message']}")
            continue
        rows.append([f"`{row['name']}`", what, *_compared_cells(row["numbers"])])
    text, calibration = found["text"], found["calibration"]
    said = (
        f"**{label}.** {text['sequences']} x {text['sequence_length']} tokens of held-out text, "
        f"{calibration['tokens']:,} of calibration, {text['greedy_tokens']} greedy ones; "
        f"{sum(run['seconds'] for run in results['runs']) / 60:.0f} minutes in {_runs(len(results['runs']))}."
    )
    # By the rule of today: what a result file says of itself was found by that of its day.
    recommended = recommend([_row_of(row) for row in found["rows"]], None)
    advice = [f"- {each.need}: `{each.name}`; {each.reason}" for each in recommended]
    facts = results["machine"]
    where = f"{facts['processor']}, {facts['cores']} cores; commit {facts['commit']}"
    parts = (
        said,
        table(columns, rows, (0, 1)),
        "\n".join(others),
        "\n".join(["Recommended:", "", *advice]),
        f"({where})",
    )
    return "\n\n".join(part for part in parts if part)


def _runs(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs, stopped in between"


def _compared_cells(found: Mapping[str, Any]) -> Sequence[str]:
    speed, gap, kl = found["speed"] or {}, found["perplexity_difference"], Estimate(**found["kl"])
    loaded, rate = speed.get("load_peak_bytes"), speed.get("tokens_per_s")
    return (
        f"{found['bits_per_weight']:.2f}",
        f"{found['perplexity']:.2f}",
        f"{gap['value']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})",
        f"{1000 * kl.value:.2f} ({1000 * kl.low:.2f} to {1000 * kl.high:.2f})",
        f"{found['top1_agreement']:.1%}",
        "" if found["greedy_identical"] is None else f"{found['greedy_identical']:.0%}",
        "" if found["kept_delta"] is None else f"{found['kept_delta']:.1%}",
        "" if loaded is None else f"{loaded / 1e6:.0f}",
        "" if rate is None else f"{rate:.1f}",
        ""
        if found["merge_seconds"] is None
        else f"{found['merge_seconds']:.0f}" + "+" * found["merge_resumed"],
    )


def _row_of(content: Mapping[str, Any]) -> Row:
    """The row of a comparison that `asdict` made plain data of."""
    numbers, failure = content["numbers"], content["failure"]
    return Row(
        **{
            **content,
            "numbers": None if numbers is None else numbers_of(numbers),
            "failure": None if failure is None else Failure(**failure),
        }
    )


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
