"""Feedback with other parameters than its own, on text that no other number is reported for.

One parameter at a time is changed. Files of T are calibrated on the beginning of the calibration text, as elsewhere,
and judged on its end, which nothing else looks at. What is done is kept in docs/results/study-parameters.json after
every step, and not done again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.comparison.bootstrap import ratio
from streamconv.pipeline import build_job, prepare, run
from streamconv.progress import StopRequest
from streamconv.rounding.feedback import FeedbackOptions
from tools.bench.results import RESULTS, load, machine, save
from tools.perplexity import be_quiet
from tools.study.beds import (
    BEDS,
    NOT_MEASURED,
    Bed,
    Results,
    judged,
    rounded,
    shown,
    table,
    thousandths,
)

MADE_BY = "tools/study/parameters"
RESULT = RESULTS / "study-parameters.json"
WORK = Path(".study") / "parameters"
BY_PARAMETER = ("faq-kjv-light", "faq-kjv-heavy")
# Of calibration, which are the first of the text; and the share of it, at the end, that is the judge's.
TOKENS, JUDGED_SHARE = 16_384, 0.2

USUAL, AS_IT_COMES = FeedbackOptions(), "as it comes"
OPTIONS: Mapping[str, FeedbackOptions] = {
    AS_IT_COMES: USUAL,
    "damping 0.0001": replace(USUAL, damping=0.0001),
    "damping 0.01": replace(USUAL, damping=0.01),
    "no sweeps": replace(USUAL, sweeps=0),
    "1 sweep": replace(USUAL, sweeps=1),
    "no refits": replace(USUAL, refits=0),
    "damping 0.01, 1 sweep, no refits": replace(USUAL, damping=0.01, sweeps=1, refits=0),
    "μ 0.03": replace(USUAL, preserve_delta=0.03),
    "μ 0.3": replace(USUAL, preserve_delta=0.3),
    "asymmetry 0": replace(USUAL, asymmetry=0.0),
    "output damping 0.01": replace(USUAL, output_damping=0.01),
}


def measure_bed(bed: Bed) -> None:
    """Fill in what is missing of `bed` in the results."""
    work = WORK / bed.name
    work.mkdir(parents=True, exist_ok=True)
    bed = replace(bed, held_out=_end_of(bed.calibration), calibration_tokens=TOKENS)
    for name, options in OPTIONS.items():
        results = load(RESULT)
        if name in results.get("beds", {}).get(bed.name, {}):
            continue
        print(f"{bed.name}: {name}", flush=True)
        out = work / "merged"
        shutil.rmtree(out, ignore_errors=True)
        _merge(bed, options, out)
        beds: dict[str, Any] = results.get("beds", {})
        beds[bed.name] = {**beds.get(bed.name, {}), name: rounded(judged(bed, out, work))}
        save(RESULT, MADE_BY, {"machine": machine(WORK), "tokens": TOKENS, "beds": beds})
        shutil.rmtree(out)


def _end_of(text: Path) -> Path:
    """The last part of `text` as a file, from the beginning of a line."""
    lines = text.read_text().splitlines(keepends=True)
    path = WORK / f"end-of-{text.name}"
    path.write_text("".join(lines[round(len(lines) * (1 - JUDGED_SHARE)) :]))
    return path


def _merge(bed: Bed, options: FeedbackOptions, out: Path) -> None:
    """As `streamconv merge` does it, which has no options for most of these."""
    job = build_job(
        bed.base,
        bed.adapter,
        quant="nf4-dq",
        merge_base="nf4-dq",
        rounding="feedback",
        calibration=bed.calibration,
        calibration_tokens=bed.calibration_tokens,
        calibration_sequence_length=bed.calibration_length,
    )
    prepared = prepare(job)
    calibration = prepared.plan.calibration
    assert calibration is not None
    plan = replace(prepared.plan, calibration=replace(calibration, options=options))
    run(replace(prepared, plan=plan), out, lambda done, total: None, StopRequest())


def parameters_block(_: Mapping[str, Results], others: Results) -> str:
    beds = others["parameters"].get("beds", {})
    if not beds:
        return NOT_MEASURED
    rows = []
    for name in OPTIONS:
        cells = []
        for bed in BY_PARAMETER:
            row, usual = (beds.get(bed, {}).get(each) for each in (name, AS_IT_COMES))
            cells.append("" if row is None else thousandths(row["kl"]))
            is_same = row is None or usual is None or name == AS_IT_COMES
            cells.append("" if is_same else shown(ratio(row["kl"], usual["kl"]), 3))
        rows.append([name, *cells])
    columns = [column for bed in BY_PARAMETER for column in (BEDS[bed].label, "to as it comes")]
    return table(("feedback of T", *columns), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=__doc__)
    parser.parse_args(arguments)
    be_quiet()
    for name in BY_PARAMETER:
        measure_bed(BEDS[name])


if __name__ == "__main__":
    main()
