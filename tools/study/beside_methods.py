"""GPTQ files by the strongest public methods and by `streamconv merge`: the same weights, tokens, bits and judge.

All quantize T, the adapter merged onto the base as training saw it: GPTQModel and auto-round from a float32 file of
it, a delta-aware scale search from that file and D, streamconv while it merges. Those that calibrate are given the same
sequences of token ids. `streamconv eval` judges all on held-out text against T, which is not merged there. What is done
is kept in docs/results/beside-methods.json after every step, and not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.comparison.bootstrap import perplexity, ratio
from streamconv.forward.text import load_tokenizer, read_windows
from tools.bench.results import RESULTS, ROOT, load, machine, save
from tools.make_demo_base import make_demo_base
from tools.measure import Cost, measure
from tools.perplexity import be_quiet
from tools.study.beds import (
    BEDS,
    DEMO_BASE,
    NOT_MEASURED,
    ONE_SIDED,
    Bar,
    Bed,
    Results,
    bar_of,
    described,
    judged,
    machines,
    parts_of,
    read_tensors,
    rounded,
    shown,
    streamconv,
    table,
    thousandths,
)
from tools.study.delta_scales import kept_of

MADE_BY = "tools/study/beside_methods"
RESULT = RESULTS / "beside-methods.json"
WORK = Path(".study") / "methods"
CONTESTED = ("faq-kjv-light", "faq-kjv-heavy", "demo-kjv")
# The greatest usual group of which all rows of the beds are whole: 704 and 576 columns are no multiple of 128.
GROUP = 64
# T from its file has the same weights as T unmerged; sums of the adapter's products differ in their last bits.
SAME_WEIGHTS_KL = 1e-6
STREAMCONV, GPTQMODEL, AUTOROUND, DELTA_SCALES = "streamconv", "gptqmodel", "auto-round", "delta-aware scales"


@dataclass(frozen=True, slots=True)
class Row:
    """A file written `by` a program, which is given `settings` beside bits, group and symmetry.

    `options` are those of `streamconv merge`; `calibrated`: it is given the calibration text.
    """

    name: str
    label: str
    by: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    calibrated: bool = False


def _gptqmodel(name: str, label: str, **settings: Any) -> Row:
    return Row(f"gptqmodel-{name}", f"GPTQModel, {label}", GPTQMODEL, settings)


def _ours(name: str, label: str, *options: str, calibrated: bool = False) -> Row:
    return Row(name, f"streamconv, {label}", STREAMCONV, {}, options, calibrated)


# The power of the scales' search is what GPTQModel's README names for the best quality.
THEIRS = (
    _gptqmodel("default", "as it comes"),
    _gptqmodel("mse", "scales searched", mse=2.4),
    _gptqmodel("desc-act", "activation order, scales searched", mse=2.4, desc_act=True),
    _gptqmodel("gptaq", "GPTAQ, scales searched", mse=2.4, gptaq={"alpha": 0.25}),
    _gptqmodel("foem", "FOEM, scales searched", mse=2.4, foem={"alpha": 0.0, "beta": 0.2}),
    Row("auto-round-light", "auto-round, its light recipe", AUTOROUND, {"iters": 50, "lr": 0.005}),
    Row("auto-round", "auto-round, as it comes", AUTOROUND),
    Row("delta-sign", "delta-aware scales (DAQ), by signs", DELTA_SCALES, {"metric": "sign"}),
    Row("delta-cosine", "delta-aware scales (DAQ), by cosines", DELTA_SCALES, {"metric": "cosine"}),
)
FEEDBACK = _ours("feedback", "feedback", "--rounding", "feedback", calibrated=True)
OURS = (
    _ours("nearest", "nearest", "--rounding", "nearest"),
    _ours("search", "search", "--rounding", "search"),
    _ours("stochastic", "stochastic", "--rounding", "stochastic"),
    _ours("adaptive", "adaptive", "--rounding", "adaptive"),
    _ours(
        "feedback-onesided",
        "feedback without gradients",
        "--rounding",
        "feedback",
        *ONE_SIDED,
        calibrated=True,
    ),
    FEEDBACK,
)

CONTEST: tuple[Row, ...] = (*THEIRS, *OURS)


def contest(bed: Bed, wanted: Callable[[str], bool]) -> None:
    """Fill in what is missing of `bed` in the results."""
    rows = [row for row in CONTEST if wanted(row.name) and row.name not in _results_of(bed)["rows"]]
    work = WORK / bed.name
    for row in rows:
        print(f"{bed.name}: {row.label}", flush=True)
        out = work / row.name
        shutil.rmtree(out, ignore_errors=True)
        merged = _merged(bed, work)
        found = WRITERS[row.by](row, bed, work, out)
        found |= {
            **judged(bed, out, work),
            "bits": bits_per_weight(out),
            "kept": kept_of(out, merged, bed.adapter),
        }
        _keep(bed, row.name, {"label": row.label, "by": row.by, **found})
        shutil.rmtree(out)


def _merged(bed: Bed, work: Path) -> Path:
    """T as a float32 file, checked to be T: it is a row of the results, too."""
    out = work / "T"
    if not out.exists() or "T" not in _results_of(bed)["rows"]:
        shutil.rmtree(out, ignore_errors=True)
        streamconv("merge", *parts_of(bed), "-o", str(out), "--quant", "none", "--dtype", "float32")
        found = judged(bed, out, work)
        if abs(sum(found["kl"]) / len(found["kl"])) > SAME_WEIGHTS_KL:
            sys.exit(f"{out} should be T; its KL to T is, in each sequence, {found['kl']}")
        _keep(bed, "T", {"label": "T, merged in float32", **found})
    return out


def _tokens(bed: Bed, work: Path) -> Path:
    """The sequences that `streamconv merge` calibrates with, as a file."""
    path = work / "tokens.json"
    length = bed.calibration_length
    windows = read_windows(
        bed.calibration, load_tokenizer(bed.base), bed.calibration_tokens // length, length
    )
    path.write_text(json.dumps(windows.tolist()))
    return path


def _by_environment(row: Row, bed: Bed, work: Path, out: Path) -> dict[str, Any]:
    """By a program that has an environment of its own, and a script beside this file."""
    name = row.by.replace("-", "")
    script = Path(__file__).with_name(f"quantize_with_{name}.py")
    made = subprocess.run([ROOT / "tools/foreign_environment", name], check=True, stdout=subprocess.PIPE)
    settings = {"bits": 4, "group_size": GROUP, "sym": True, **row.settings}
    parts = (str(script), str(work / "T"), str(_tokens(bed, work)), str(out), json.dumps(settings))
    cost = _succeeded([made.stdout.decode().strip(), "-P", *parts])
    return {"options": settings, **json.loads(cost.stdout.splitlines()[-1]), **_costs(cost)}


def _by_delta_scales(row: Row, bed: Bed, work: Path, out: Path) -> dict[str, Any]:
    """The scales and codes of the file of nearest rounding are replaced; its time is not counted."""
    start = work / "nearest-to-start-from"
    shutil.rmtree(start, ignore_errors=True)
    _merge(bed, start, "--rounding", "nearest")
    parts = (str(start), str(work / "T"), str(bed.adapter), str(out), row.settings["metric"])
    cost = _succeeded([sys.executable, "-m", "tools.study.delta_scales", *parts])
    shutil.rmtree(start)
    return {"options": dict(row.settings), **_costs(cost)}


def _by_streamconv(row: Row, bed: Bed, work: Path, out: Path) -> dict[str, Any]:
    options = [*row.options, *(bed.calibration_options if row.calibrated else ())]
    return {"options": options, **_costs(_merge(bed, out, *options))}


WRITERS: Mapping[str, Callable[[Row, Bed, Path, Path], dict[str, Any]]] = {
    GPTQMODEL: _by_environment,
    AUTOROUND: _by_environment,
    DELTA_SCALES: _by_delta_scales,
    STREAMCONV: _by_streamconv,
}


def _merge(bed: Bed, out: Path, *options: str) -> Cost:
    parts = (*parts_of(bed), "-o", str(out), "--quant", "gptq", "--group-size", str(GROUP))
    return streamconv("merge", *parts, *options)


def _succeeded(command: Sequence[str]) -> Cost:
    cost = measure(command)
    if cost.exit_code:
        sys.exit(f"{cost.stdout}\n{cost.stderr}\n`{' '.join(command)}` ended with exit {cost.exit_code}")
    return cost


def _costs(cost: Cost) -> dict[str, float]:
    return {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s}


def bits_per_weight(folder: Path) -> float:
    """Bits of all tensors of quantized modules, by their bytes, for each weight that they hold."""
    tensors = read_tensors(folder)
    packed = {name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")}
    held = [tensor.nbytes for name, tensor in tensors.items() if name[: name.rfind(".") + 1] in packed]
    codes = sum(tensors[f"{module}qweight"].nbytes for module in packed)
    return 4 * sum(held) / codes


def _results_of(bed: Bed) -> dict[str, Any]:
    empty: dict[str, Any] = {"bed": described(bed), "group_size": GROUP, "rows": {}}
    found: dict[str, Any] = load(RESULT).get("beds", {}).get(bed.name, empty)
    return found


def _keep(bed: Bed, name: str, row: Mapping[str, Any]) -> None:
    results, of_bed = load(RESULT), _results_of(bed)
    of_bed["rows"][name] = rounded(row)
    beds = {**results.get("beds", {}), bed.name: of_bed}
    ordered = {each: beds[each] for each in CONTESTED if each in beds}
    save(RESULT, MADE_BY, {"machine": machine(WORK), "beds": ordered})


def contest_bars(results: Results) -> Iterator[Bar]:
    """Of the others that counts which does best, of what was measured, on the very text that all are judged by."""
    for name in CONTESTED:
        rows = results.get("beds", {}).get(name, {}).get("rows", {})
        theirs = [rows[each.name] for each in THEIRS if each.name in rows]
        for most, claim in ((1.0, "not above"), (0.5, "at most half of")):

            def say(
                ours: Results, theirs: Sequence[Results] = tuple(theirs), most: float = most
            ) -> tuple[bool, str]:
                greatest = max((ratio(ours["kl"], each["kl"]) for each in theirs), key=lambda one: one.value)
                return (
                    greatest.value <= most,
                    f"ratio to the best of {len(theirs)} ways: {shown(greatest, 3)}",
                )

            found = {FEEDBACK.name: rows.get(FEEDBACK.name) if theirs else None}
            yield bar_of(
                f"{BEDS[name].label}: KL to T of the GPTQ file of feedback of T is {claim} that of others'",
                found,
                say,
            )


def methods_block(_: Mapping[str, Results], others: Results) -> str:
    """GPTQ files by public methods and by streamconv, a table for each bed."""
    results = others["methods"]
    if not results:
        return NOT_MEASURED
    parts = [_contest(BEDS[name].label, found) for name, found in results["beds"].items()]
    versions = {
        row["by"]: ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for found in results["beds"].values()
        for row in found["rows"].values()
        if "versions" in row
    }
    said = [f"- {by}: {found}" for by, found in versions.items()]
    return "\n\n".join((*parts, "\n".join((*said, *machines({STREAMCONV: results})))))


def _contest(label: str, results: Results) -> str:
    columns = (
        "file",
        "bits a weight",
        "perplexity",
        "KL to T, 1/1000 nat",
        "same top token",
        "kept delta",
        "KL to that of streamconv, feedback",
        "processor time, s",
    )
    measured = results["rows"]
    ours = measured.get(FEEDBACK.name)
    rows = []
    for name in ("T", *(row.name for row in CONTEST)):
        if (found := measured.get(name)) is None:
            continue
        again = shown(ratio(found["kl"], ours["kl"])) if ours and name not in ("T", FEEDBACK.name) else ""
        cells = [
            found["label"],
            f"{found['bits']:.2f}" if "bits" in found else "32",
            f"{perplexity(found['losses']).value:.2f}",
            "0" if name == "T" else thousandths(found["kl"]),
            f"{found['agreement']:.1%}",
            f"{found['kept']:.3f}" if "kept" in found else "",
            again,
            f"{found['cpu_s']:.0f}" if "cpu_s" in found else "",
        ]
        rows.append(cells)
    said = (
        f"{results['bed']['calibration_tokens']:,} tokens of calibration, groups of {results['group_size']}"
    )
    return f"**{label}** ({said})\n\n{table(columns, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=__doc__)
    parser.add_argument("beds", nargs="*", help=f"{', '.join(CONTESTED)}; all, unless some are named")
    parser.add_argument("--only", action="append", default=[], help="a row; repeatable")
    parser.add_argument("--anew", action="append", default=[], help="a row to measure again; repeatable")
    options = parser.parse_args(arguments)
    if unknown := set(options.beds) - set(CONTESTED):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(CONTESTED)}")
    be_quiet()
    chosen = [BEDS[name] for name in options.beds or CONTESTED]
    if any(bed.base == DEMO_BASE for bed in chosen):
        make_demo_base(DEMO_BASE)
    for bed in chosen:
        (WORK / bed.name).mkdir(parents=True, exist_ok=True)
        _forget(bed, options.anew)
        contest(bed, lambda name: not options.only or name in options.only)


def _forget(bed: Bed, names: Sequence[str]) -> None:
    if results := load(RESULT):
        for name in names:
            results["beds"].get(bed.name, {"rows": {}})["rows"].pop(name, None)
        save(RESULT, MADE_BY, results)


if __name__ == "__main__":
    main()
