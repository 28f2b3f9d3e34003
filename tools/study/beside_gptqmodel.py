"""GPTQ files by GPTQModel and by `streamconv merge`: the same weights, tokens and bits, and one judge.

Both quantize T, the adapter merged onto the base as training saw it: GPTQModel from a float32 file of it, streamconv
while it merges. Both are given the same sequences of token ids. `streamconv eval` judges both on held-out text against
T, which is not merged there. What is done is kept in docs/results/foreign-gptq-quantizer.json after every step, and not
done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.comparison.bootstrap import perplexity, ratio
from streamconv.forward.text import load_tokenizer, read_windows
from tools.bench.results import RESULTS, load, machine, save
from tools.make_demo_base import make_demo_base
from tools.measure import measure
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

MADE_BY = "tools/study/beside_gptqmodel"
RESULT = RESULTS / "foreign-gptq-quantizer.json"
WORK = Path(".study") / "gptqmodel"
QUANTIZER = Path(__file__).with_name("quantize_with_gptqmodel.py")
CONTESTED = ("faq-kjv-light", "faq-kjv-heavy", "demo-kjv")
# The greatest usual group of which all rows of the beds are whole: 704 and 576 columns are no multiple of 128.
GROUP = 64
# T from its file has the same weights as T unmerged; sums of the adapter's products differ in their last bits.
SAME_WEIGHTS_KL = 1e-6


@dataclass(frozen=True, slots=True)
class Theirs:
    """A file by GPTQModel, whose QuantizeConfig is given `settings` beside bits, group and symmetry."""

    name: str
    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ours:
    """A file by `streamconv merge` with `options`; `calibrated`: it is given the calibration text."""

    name: str
    label: str
    options: tuple[str, ...]
    calibrated: bool


MSE = {"mse": 2.4}  # the power that GPTQModel's README names for the best quality
AS_IT_COMES = Theirs("gptqmodel-default", "GPTQModel, as it comes", {})
THEIRS = (
    AS_IT_COMES,
    Theirs("gptqmodel-mse", "GPTQModel, scales searched", MSE),
    Theirs("gptqmodel-desc-act", "GPTQModel, activation order, scales searched", {**MSE, "desc_act": True}),
    Theirs("gptqmodel-gptaq", "GPTQModel, GPTAQ, scales searched", {**MSE, "gptaq": {"alpha": 0.25}}),
    Theirs(
        "gptqmodel-foem", "GPTQModel, FOEM, scales searched", {**MSE, "foem": {"alpha": 0.0, "beta": 0.2}}
    ),
)
FEEDBACK = Ours("feedback", "streamconv, feedback", ("--rounding", "feedback"), calibrated=True)
ONE_SIDED_FEEDBACK = Ours(
    "feedback-onesided",
    "streamconv, feedback without gradients",
    ("--rounding", "feedback", *ONE_SIDED),
    calibrated=True,
)
OURS = (
    Ours("nearest", "streamconv, nearest", ("--rounding", "nearest"), calibrated=False),
    ONE_SIDED_FEEDBACK,
    FEEDBACK,
)

CONTEST: tuple[Theirs | Ours, ...] = (*THEIRS, *OURS)


def contest(bed: Bed, python: Path, wanted: Callable[[str], bool]) -> None:
    """Fill in what is missing of `bed` in the results. `python` is that of an environment with GPTQModel."""
    rows = [row for row in CONTEST if wanted(row.name) and row.name not in _results_of(bed)["rows"]]
    work = WORK / bed.name
    for row in rows:
        print(f"{bed.name}: {row.label}", flush=True)
        out = work / row.name
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(row, Theirs):
            found = _theirs(row, python, _merged(bed, work), _tokens(bed, work), out)
        else:
            found = _ours(row, bed, out)
        _keep(
            bed,
            row.name,
            {"label": row.label, **found, **judged(bed, out, work), "bits": bits_per_weight(out)},
        )
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


def _theirs(row: Theirs, python: Path, model: Path, tokens: Path, out: Path) -> dict[str, Any]:
    settings = {"bits": 4, "group_size": GROUP, "sym": True, **row.settings}
    command = [str(python), "-P", str(QUANTIZER), str(model), str(tokens), str(out), json.dumps(settings)]
    cost = measure(command)
    if cost.exit_code:
        sys.exit(f"{cost.stdout}\n{cost.stderr}\nGPTQModel ended with exit {cost.exit_code}")
    said = json.loads(cost.stdout.splitlines()[-1])
    return {"by": "gptqmodel", "options": settings, **said, "wall_s": cost.wall_s, "cpu_s": cost.cpu_s}


def _ours(row: Ours, bed: Bed, out: Path) -> dict[str, Any]:
    options = [*row.options, *(bed.calibration_options if row.calibrated else ())]
    cost = streamconv(
        "merge", *parts_of(bed), "-o", str(out), "--quant", "gptq", "--group-size", str(GROUP), *options
    )
    return {"by": "streamconv", "options": options, "wall_s": cost.wall_s, "cpu_s": cost.cpu_s}


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
    """Of GPTQModel that counts which does best, of what was measured, on the very text that both are judged by."""
    for name in CONTESTED:
        rows = results.get("beds", {}).get(name, {}).get("rows", {})
        theirs = [rows[each.name] for each in THEIRS if each.name in rows]

        def say(ours: Results, _: Results, theirs: Sequence[Results] = tuple(theirs)) -> tuple[bool, str]:
            shares = [ratio(ours["kl"], each["kl"]) for each in theirs]
            most = max(shares, key=lambda share: share.value)
            return most.value <= 1, f"ratio to the best of {len(theirs)} ways: {shown(most, 3)}"

        claim = (
            f"{BEDS[name].label}: KL to T of the GPTQ file of feedback of T is not above that of GPTQModel's"
        )
        yield bar_of(claim, {each.name: rows.get(each.name) for each in (FEEDBACK, AS_IT_COMES)}, say)


def gptqmodel_block(_: Mapping[str, Results], others: Results) -> str:
    """GPTQ files by GPTQModel and by streamconv, a table for each bed."""
    results = others["gptqmodel"]
    if not results:
        return NOT_MEASURED
    parts = [_contest(BEDS[name].label, found) for name, found in results["beds"].items()]
    theirs = next(
        row for found in results["beds"].values() for row in found["rows"].values() if "versions" in row
    )
    versions = ", ".join(f"{name} {version}" for name, version in theirs["versions"].items())
    (machine,) = machines({"streamconv": results})
    return "\n\n".join((*parts, f"- GPTQModel: {versions}\n{machine}"))


def _contest(label: str, results: Results) -> str:
    columns = (
        "file",
        "bits a weight",
        "perplexity",
        "KL to T, 1/1000 nat",
        "same top token",
        "KL to that of streamconv, feedback",
        "processor time, s",
    )
    measured = results["rows"]
    ours = measured.get(FEEDBACK.name)
    rows = []
    for name, words in {"T": "T, merged in float32", **{row.name: row.label for row in CONTEST}}.items():
        if (found := measured.get(name)) is None:
            continue
        again = shown(ratio(found["kl"], ours["kl"])) if ours and name not in ("T", FEEDBACK.name) else ""
        cells = [
            words,
            f"{found['bits']:.2f}" if "bits" in found else "32",
            f"{perplexity(found['losses']).value:.2f}",
            "0" if name == "T" else thousandths(found["kl"]),
            f"{found['agreement']:.1%}",
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
    parser.add_argument("--python", type=Path, required=True, help="of an environment that has GPTQModel")
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
        contest(bed, options.python, lambda name: not options.only or name in options.only)


def _forget(bed: Bed, names: Sequence[str]) -> None:
    if results := load(RESULT):
        for name in names:
            results["beds"].get(bed.name, {"rows": {}})["rows"].pop(name, None)
        save(RESULT, MADE_BY, results)


if __name__ == "__main__":
    main()
