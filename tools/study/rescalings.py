"""What `--rescale awq` is worth under each rounding: AWQ files of T with it and without.

What is done is kept in docs/results/study-rescalings.json after every step, and not done again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.results import RESULTS, load, machine, save
from tools.perplexity import be_quiet
from tools.study.beds import (
    BEDS,
    NOT_MEASURED,
    ONE_SIDED,
    Bed,
    Results,
    judged,
    parts_of,
    rounded,
    streamconv,
    table,
    thousandths,
)

MADE_BY = "tools/study/rescalings"
RESULT = RESULTS / "study-rescalings.json"
WORK = Path(".study") / "rescalings"
RESCALED = ("faq-kjv-light", "faq-kjv-heavy")
# The greatest usual group of which all rows are whole.
GROUP = 64
RESCALE = ("--rescale", "awq")


@dataclass(frozen=True, slots=True)
class Row:
    """`options` of a merge that is given the calibration text, but for nearest rounding without rescaling."""

    name: str
    label: str
    options: tuple[str, ...]

    @property
    def is_rescaled(self) -> bool:
        return self.options[-2:] == RESCALE


_ROUNDINGS = (
    ("nearest", "nearest", ("--rounding", "nearest")),
    ("search", "search, with text", ("--rounding", "search")),
    ("onesided", "feedback, one-sided", ("--rounding", "feedback", *ONE_SIDED)),
    ("feedback", "feedback", ("--rounding", "feedback")),
)
ROWS = tuple(
    Row(f"{name}{suffix}", label, (*options, *rescale))
    for name, label, options in _ROUNDINGS
    for suffix, rescale in (("", ()), ("-rescaled", RESCALE))
)


def measure_bed(bed: Bed) -> None:
    """Fill in what is missing of `bed` in the results."""
    work = WORK / bed.name
    work.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        results = load(RESULT)
        if row.name in results.get("beds", {}).get(bed.name, {}):
            continue
        print(f"{bed.name}: {row.name}", flush=True)
        found = _measured(row, bed, work)
        beds: dict[str, Any] = results.get("beds", {})
        beds[bed.name] = {**beds.get(bed.name, {}), row.name: rounded(found)}
        save(RESULT, MADE_BY, {"group_size": GROUP, "machine": machine(WORK), "beds": beds})


def _measured(row: Row, bed: Bed, work: Path) -> dict[str, Any]:
    out = work / row.name
    shutil.rmtree(out, ignore_errors=True)
    text = () if row.options == ("--rounding", "nearest") else bed.calibration_options
    cost = streamconv(
        *("merge", *parts_of(bed), "-o", str(out), "--quant", "awq", "--group-size", str(GROUP)),
        *row.options,
        *text,
    )
    found = {**judged(bed, out, work), "options": row.options, "cpu_s": cost.cpu_s}
    shutil.rmtree(out)
    return found


def rescalings_block(_: Mapping[str, Results], others: Results) -> str:
    beds = others["rescalings"].get("beds", {})
    if not beds:
        return NOT_MEASURED
    rows = []
    for row in ROWS:
        found = [beds.get(name, {}).get(row.name) for name in RESCALED]
        cells = ["" if each is None else thousandths(each["kl"]) for each in found]
        rows.append(["awq" if row.is_rescaled else "none", row.label, *cells])
    columns = ("`--rescale`", "`--rounding`", *(f"`{name}`" for name in RESCALED))
    return table(columns, rows, (0, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=__doc__)
    parser.parse_args(arguments)
    be_quiet()
    for name in RESCALED:
        measure_bed(BEDS[name])


if __name__ == "__main__":
    main()
