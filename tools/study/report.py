"""Pages of docs: what is measured there comes from docs/results.

A block of a page stands between `<!-- NAME: made by tools/study/report -->` and `<!-- end -->`; the words around
blocks are written by hand and hold no measured number. `--check` writes nothing and ends with 1 if a block is not
what the results say; `--bars` prints what has been shown and what has not.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from streamconv.analysis.prediction import predicted_kept
from streamconv.comparison.bootstrap import (
    Estimate,
    Sample,
    difference,
    estimate,
    mean,
    perplexity,
    perplexity_difference,
    ratio,
)
from streamconv.kernels.grids import NF4
from streamconv.rounding.adaptive import NEAREST_FROM
from tools.bench.results import RESULTS, ROOT, load
from tools.study import beside_methods, formats, parameters, rescalings
from tools.study.beds import (
    BEDS,
    NOT_MEASURED,
    Bar,
    Results,
    bar_of,
    machines,
    percent,
    shown,
    table,
    thousandths,
)
from tools.study.beside_methods import contest_bars, methods_block
from tools.study.comparisons import AMOUNTS, compared_bars, compared_block, results_path
from tools.study.cost import cost_block
from tools.study.format_tables import kept_block, owners_block, written_block
from tools.study.parameters import parameters_block
from tools.study.rescalings import rescalings_block
from tools.study.run import (
    ADAPTIVE_T,
    FEEDBACK,
    FEEDBACK_F,
    FEEDBACK_T,
    NEAREST_F,
    NEAREST_T,
    ONE_SIDED_T,
    OPENED,
    RESIDUAL_T,
    SEARCH_T,
    STOCHASTIC_T,
    TERM_FEEDBACK_T,
    TERM_ONE_SIDED_T,
    WEIGHED_SEARCH_T,
    Merged,
)

# -- checks --------------------------------------------------------------------------------------------------


# Below this share a fine-tune counts as erased; it is the default of --min-kept.
ERASED = 0.2


def predicted_share(weights: Sequence[Mapping[str, Any]]) -> float:
    """Mean over `weights` of the share foretold for each, by the squares of their deltas, as the kept delta is."""
    squares = [weight["delta_square"] for weight in weights]
    shares = [_predicted_kept(weight["ratio"], weight["delta_kurtosis"]) for weight in weights]
    return float(np.average(shares, weights=squares))


@functools.cache
def _predicted_kept(ratio: float, kurtosis: float) -> float:
    """What nearest rounding to nf4 keeps: asked for a table, a picture and a check of the same weights."""
    return predicted_kept(ratio, NF4, kurtosis)


STOCHASTIC = "stochastic-T"
ALONE = f"{RESIDUAL_T.name}-alone"
MOST_MINUTES = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy on one bed, one number a sequence; stochastic rounding is the mean over its seeds."""

    losses: list[float]
    kl: list[float]


def row_of(results: Results, name: str) -> Row | None:
    """The measured row `name` of a bed's results; None if it is not there. Of seeds, those that are there.

    ALONE is the file of the row with a residual adapter, without that.
    """
    names = [each.name for each in STOCHASTIC_T] if name == STOCHASTIC else [name]
    rows = results.get("rows", {})
    rows = rows | {ALONE: rows[RESIDUAL_T.name]["alone"]} if RESIDUAL_T.name in rows else rows
    found = [rows[each] for each in names if each in rows]
    if not found:
        return None
    means = (np.mean([each[key] for each in found], axis=0).tolist() for key in ("losses", "kl"))
    return Row(*means)


def bars(beds: Mapping[str, Results], others: Results) -> Iterator[Bar]:
    """All checks in the order of the page; `beds` by name, `others` as `report.read` has them."""
    demo = beds["demo-kjv"]
    yield _removed(demo, STOCHASTIC, 0.70)
    for feedback in (FEEDBACK_T, TERM_FEEDBACK_T, ONE_SIDED_T, TERM_ONE_SIDED_T):
        yield _removed(demo, feedback.name, 0.94)
    yield _closer_by_the_delta_term(demo, TERM_FEEDBACK_T, FEEDBACK_T)
    yield _closer_by_the_delta_term(demo, TERM_ONE_SIDED_T, ONE_SIDED_T)
    yield _best_with_the_base(demo)
    for name, bed in BEDS.items():
        yield _erased_as_predicted(bed.label, beds[name])
        if name != "demo-kjv":
            for feedback in (FEEDBACK_T, TERM_FEEDBACK_T):
                yield _half_the_kl(bed.label, beds[name], feedback, NEAREST_F.name, "nearest of F")
                yield _half_the_kl(bed.label, beds[name], feedback, STOCHASTIC, "stochastic of T")
        if name.startswith("faq"):
            yield _half_the_kl(bed.label, beds[name], RESIDUAL_T, ALONE, "the same file alone")
            yield _half_the_kl(bed.label, beds[name], RESIDUAL_T, FEEDBACK_T.name, "feedback of T alone")
    yield from _synthetic(others["synthetic"])
    yield from contest_bars(others["methods"])
    for name, found in others["compared"].items():
        yield from compared_bars(name, found)
    yield _exact(beds)
    yield _cost(demo)


def _rows(results: Results, *names: str) -> dict[str, Row | None]:
    return {name: row_of(results, name) for name in names}


def _removed(results: Results, name: str, least: float) -> Bar:
    def say(row: Row, nearest: Row, trained: Row) -> tuple[bool, str]:
        share = loss_removed(row.losses, nearest.losses, trained.losses)
        return share.value >= least, percent(share)

    claim = f"demo-kjv: {name} removes at least {least:.0%} of the loss of nearest of T"
    return bar_of(claim, _rows(results, name, NEAREST_T.name, "T"), say)


def _closer_by_the_delta_term(results: Results, ours: Merged, other: Merged) -> Bar:
    def say(term: Row, plain: Row) -> tuple[bool, str]:
        share, gap = ratio(term.kl, plain.kl), difference(term.kl, plain.kl)
        said = f"ratio {shown(share, 3)}, difference {shown(gap, 5)}"
        return share.value <= 0.75 and not gap.low <= 0 <= gap.high, said

    claim = (
        f"demo-kjv: KL to T of {ours.name} is at most 0.75 times that of {other.name}, the difference not 0"
    )
    return bar_of(claim, _rows(results, ours.name, other.name), say)


def _best_with_the_base(results: Results) -> Bar:
    names = (FEEDBACK_F.name, FEEDBACK_T.name, NEAREST_F.name)

    def say(trained: Row, *rows: Row) -> tuple[bool, str]:
        gaps = {
            name: perplexity_difference(row.losses, trained.losses)
            for name, row in zip(names, rows, strict=True)
        }
        best = min(gaps, key=lambda name: gaps[name].value)
        return gaps[best].low <= 0, f"{best}: {shown(gaps[best])} above T"

    claim = "demo-kjv: the best strategy given the 16-bit base is not above ppl(T) beyond the interval"
    return bar_of(claim, _rows(results, "T", *names), say)


def _erased_as_predicted(label: str, results: Results) -> Bar:
    """Erased: nearest of T keeps under `ERASED` of what the fine-tune gained over the nf4 base, in log perplexity."""

    def say(trained: Row, base: Row, nearest: Row) -> tuple[bool, str]:
        levels = [np.mean(row.losses) for row in (trained, base, nearest)]
        measured = float((levels[1] - levels[2]) / (levels[1] - levels[0]))
        predicted = predicted_share(results["weights"])
        said = f"predicted kept share {predicted:.1%}, kept of the gain {measured:.1%}"
        return (predicted < ERASED) == (measured < ERASED), said

    claim = f"{label}: nearest of T erases (keeps under {ERASED:.0%}) exactly where predicted"
    return bar_of(claim, _rows(results, "T", "base-nf4", NEAREST_T.name), say)


def _half_the_kl(label: str, results: Results, feedback: Merged, other: str, words: str) -> Bar:
    def say(ours: Row, theirs: Row) -> tuple[bool, str]:
        share = ratio(ours.kl, theirs.kl)
        return share.value <= 0.5, f"ratio {shown(share, 3)}"

    claim = f"{label}: KL to T of {feedback.name} is at most half of that of {words}"
    return bar_of(claim, _rows(results, feedback.name, other), say)


def _synthetic(synthetic: Results) -> Iterator[Bar]:
    for name, words, low, high in (
        ("nearest", "below 0.3", -np.inf, 0.3),
        ("feedback, delta term", "above 0.9", 0.9, np.inf),
    ):
        claim = f"synthetic layer, delta of 5 %: kept share of {name} of T {words}"
        if not synthetic:
            yield Bar(claim, None, "not measured yet")
            continue
        kept = synthetic["compensated"][name]["kept"]
        yield Bar(claim, low < kept["mean"] < high, f"{kept['mean']:.3f} ± {kept['sd']:.3f}")


def _exact(beds: Mapping[str, Results]) -> Bar:
    claim = "every output opens in stock transformers, and bitsandbytes decodes it to the bits that streamconv does"
    rows = [
        (bed, name, row["not_exact"])
        for bed, results in beds.items()
        for name, row in results.get("rows", {}).items()
        if "not_exact" in row
    ]
    wrong = [f"{bed} {name}" for bed, name, modules in rows if modules]
    said = f"{len(rows)} outputs" + (f"; not {', '.join(wrong)}" if wrong else "")
    return Bar(claim, (not wrong) if rows else None, said)


def _cost(results: Results) -> Bar:
    claim = f"demo-kjv: {FEEDBACK_T.name} at 16,384 tokens takes under {MOST_MINUTES} minutes on 2 cores"
    row = results.get("rows", {}).get(FEEDBACK_T.name)
    if row is None:
        return Bar(claim, None, "not measured yet")
    minutes = row["wall_s"] / 60
    said = f"{minutes:.1f} min, {row['cpu_s'] / 60:.1f} min of processor time"
    return Bar(claim, minutes < MOST_MINUTES, said)


def loss_removed(losses: Sequence[float], worst: Sequence[float], best: Sequence[float]) -> Estimate:
    """Which share of the perplexity between `worst` and `best` is gone: 0 at the worst, 1 at the best."""

    def share(found: Sample) -> Sample:
        value, high, low = np.exp(np.moveaxis(found, -1, 0))
        result: Sample = (high - value) / (high - low)
        return result

    return estimate(share, losses, worst, best)


# -- tables and sentences ------------------------------------------------------------------------------------


STRATEGIES: Mapping[str, str] = {
    **{row.name: row.label for row in OPENED},
    **{row.name: row.label for row in (NEAREST_T, NEAREST_F)},
    STOCHASTIC: "stochastic of T",
    **{row.name: row.label for row in (ADAPTIVE_T, SEARCH_T, WEIGHED_SEARCH_T, *FEEDBACK)},
}
# Upper ends of the delta-to-step ratio, and what to do below them.
DECISIONS = (
    (
        0.05,
        "erased",
        "feedback of T with calibration text; without, nearest of F (16-bit base) or stochastic of T",
    ),
    (0.1, "erased", "the same"),
    (0.2, "damaged", "the same"),
    (NEAREST_FROM, "mostly kept, and still worse than at random", "the same"),
    (1.0, "kept", "feedback of T with calibration text; without, nearest of T"),
)


def beds_block(beds: Mapping[str, Results], _: Results) -> str:
    columns = ("bed", "delta-to-step ratio", "‖D‖ / ‖Wq‖", "‖W - Wq‖ / ‖D‖", "evaluated on", "calibrated on")
    rows = []
    for name, bed in BEDS.items():
        weights = beds[name].get("weights")
        sizes = ["", "", ""]
        if weights:
            sizes = [
                _spread([weight["ratio"] for weight in weights]),
                _spread([100 * weight["delta_to_weight"] for weight in weights], "{:.1f} %"),
                _spread([weight["error_to_delta"] for weight in weights], "{:.1f}"),
            ]
        held_out = f"{bed.windows} of {bed.tokens} tokens, `{bed.held_out}`"
        calibration = f"{bed.calibration_tokens:,} tokens, `{bed.calibration}`"
        rows.append([bed.label, *sizes, held_out, calibration])
    return table(columns, rows, words=(0, 4, 5))


def strategies_block(beds: Mapping[str, Results], _: Results) -> str:
    return "\n\n".join(_strategies(BEDS[name].label, results) for name, results in beds.items())


def _strategies(label: str, results: Results) -> str:
    trained = row_of(results, "T")
    if trained is None:
        return f"**{label}**: {NOT_MEASURED}"
    columns = (
        "weights",
        "perplexity",
        "above T",
        "KL to T, 1/1000 nat",
        "same top token",
        "kept delta",
        "codes changed",
    )
    rows = []
    for name, words in STRATEGIES.items():
        if (row := row_of(results, name)) is None:
            continue
        first = results["rows"][STOCHASTIC_T[0].name if name == STOCHASTIC else name]
        cells = [
            words,
            f"{perplexity(row.losses).value:.2f}",
            "" if name == "T" else shown(perplexity_difference(row.losses, trained.losses)),
            "0" if name == "T" else thousandths(row.kl),
            f"{first['agreement']:.1%}",
            f"{first['kept']:.3f}" if "kept" in first else "",
            f"{100 * first['changed']:.2g} %" if "changed" in first else "",
        ]
        rows.append(cells)
    return f"**{label}**\n\n{table(columns, rows)}"


def dead_zone_block(beds: Mapping[str, Results], _: Results) -> str:
    columns = (
        "bed",
        "predicted kept share",
        "kept by nearest of T",
        "codes changed",
        "perplexity: T, nearest of T, nf4 base",
    )
    rows = []
    for name, bed in BEDS.items():
        weights, measured = beds[name].get("weights"), beds[name].get("rows", {})
        levels = [row_of(beds[name], row) for row in ("T", NEAREST_T.name, "base-nf4")]
        if not weights or None in levels:
            continue
        nearest = measured[NEAREST_T.name]
        said = ", ".join(f"{perplexity(level.losses).value:.1f}" for level in levels if level)
        predicted = f"{predicted_share(weights):.1%}"
        rows.append(
            [bed.label, predicted, f"{nearest['kept']:.1%}", f"{100 * nearest['changed']:.2g} %", said]
        )
    return table(columns, rows)


def coupling_block(beds: Mapping[str, Results], others: Results) -> str:
    columns = (
        "delta-to-step ratio",
        "kept, scales chosen anew",
        "kept, scales held",
        "codes changed",
        "of these, dragged by the scale",
    )
    rows = []
    for row in others["synthetic"].get("dead_zone", []):
        changed, dragged = row["changed"]["mean"], row["dragged"]["mean"]
        share = f"{dragged / changed:.0%}" if changed > 1e-4 else ""
        kept = _with_sd(row["nearest_T"]), _with_sd(row["nearest_T_on_fixed_scales"])
        rows.append([f"{row['ratio']['mean']:.3f}", *kept, f"{changed:.2%}", share])
    moved = [
        f"{BEDS[name].label} {_spread([100 * weight['scale_moved'] for weight in results['weights']], '{:.2f} %')}"
        for name, results in beds.items()
        if results.get("weights")
    ]
    said = f"Mean change of a block's scale, over adapted weights: {'; '.join(moved)}."
    return f"{table(columns, rows)}\n\n{said}"


def objective_block(_: Mapping[str, Results], others: Results) -> str:
    columns = ("rounding of T", "error of the output", "kept delta", "kept in the output")
    rows = []
    for name, row in others["synthetic"].get("compensated", {}).items():
        error = {key: 100 * value for key, value in row["output_error"].items()}
        kept = _with_sd(row["kept"]), _with_sd(row["kept_in_outputs"])
        rows.append([name, f"{_with_sd(error, '{:.2f}')} %", *kept])
    return table(columns, rows)


def distributions_block(beds: Mapping[str, Results], _: Results) -> str:
    columns = (
        "bed",
        "kurtosis: base, T, nearest of T",
        "largest entry in rms: base, T, nearest of T",
        "largest change of a kurtosis by merging",
    )
    rows = []
    for name, bed in BEDS.items():
        if weights := beds[name].get("weights"):
            medians = [
                ", ".join(f"{np.median([weight[state][key] for weight in weights]):.2f}" for state in STATES)
                for key in ("kurtosis", "largest")
            ]
            before, after = (
                np.array([weight[state]["kurtosis"] for weight in weights]) for state in STATES[:2]
            )
            changes = after / before - 1
            rows.append([bed.label, *medians, f"{changes[np.abs(changes).argmax()]:+.1%}"])
    return f"{table(columns, rows)}\n\nMedians over the adapted weights."


STATES = ("shape_before", "shape_of_target", "shape_after")


def decision_block(beds: Mapping[str, Results], others: Results) -> str:
    """Bins of the delta-to-step ratio with what the formula foretells, what was measured, and what to choose."""
    columns = (
        "delta-to-step ratio",
        "nearest of T keeps: formula",
        "synthetic layers",
        "beds here: kept; KL of nearest of T to that of feedback",
        "the fine-tune is",
        "choose",
    )
    rows, below = [], 0.0
    for limit, state, choice in DECISIONS:
        formula = " to ".join(f"{predicted_kept(end, NF4):.2f}" for end in (below, limit))
        inside = [
            row["nearest_T"]["mean"]
            for row in others["synthetic"].get("dead_zone", [])
            if below <= row["ratio"]["mean"] < limit
        ]
        measured = f"{min(inside):.2f} to {max(inside):.2f}" if inside else ""
        named = [_placed(name, beds[name]) for name in BEDS if below <= _typical(beds[name]) < limit]
        rows.append([f"{below:g} to {limit:g}", formula, measured, "; ".join(named), state, choice])
        below = limit
    return table(columns, rows, words=(0, 3, 4, 5))


def _typical(results: Results) -> float:
    """A bed's delta-to-step ratio: the median over its adapted weights."""
    weights = results.get("weights")
    return float(np.median([weight["ratio"] for weight in weights])) if weights else float("inf")


def _placed(name: str, results: Results) -> str:
    nearest, ours = row_of(results, NEAREST_T.name), row_of(results, FEEDBACK_T.name)
    if nearest is None:
        return BEDS[name].label
    said = f"{BEDS[name].label}: {results['rows'][NEAREST_T.name]['kept']:.2f}"
    return said + (f", {ratio(nearest.kl, ours.kl).value:.0f} times" if ours else "")


def sizes_block(_: Mapping[str, Results], others: Results) -> str:
    """One update in several sizes, rounded without text: KL to T, which is another model at every size."""
    columns = (
        "times the update",
        "delta-to-step ratio",
        "nearest of T keeps",
        "KL, 1/1000 nat: nearest of T",
        "stochastic of T",
        "adaptive of T",
    )
    rows = []
    for factor, found in others["sizes"].items():
        seeds = np.mean([found[row.name]["kl"] for row in STOCHASTIC_T], axis=0).tolist()
        kl = (found[NEAREST_T.name]["kl"], seeds, found[ADAPTIVE_T.name]["kl"])
        said = [thousandths(each) for each in kl]
        rows.append([factor, _spread(found["ratios"]), f"{found[NEAREST_T.name]['kept']:.1%}", *said])
    return table(columns, rows)


KEPT_BY_LAYER = (NEAREST_T, STOCHASTIC_T[0], FEEDBACK_T, TERM_ONE_SIDED_T)


def layers_block(beds: Mapping[str, Results], _: Results) -> str:
    """Kept delta of the demo's adapter by layer: the median over its weights, the least and the greatest."""
    rows = beds["demo-kjv"].get("rows", {})
    chosen = [row for row in KEPT_BY_LAYER if row.name in rows]
    layers: dict[int, list[str]] = {}
    for name in rows[chosen[0].name]["kept_by_weight"] if chosen else ():
        layers.setdefault(int(name.split(".layers.")[1].split(".")[0]), []).append(name)
    cells = []
    for layer, names in sorted(layers.items()):
        kept = ([rows[row.name]["kept_by_weight"][name] for name in names] for row in chosen)
        cells.append([str(layer), *(_spread(each, "{:.2f}") for each in kept)])
    return table(("layer", *(row.label for row in chosen)), cells)


def delta_term_block(beds: Mapping[str, Results], _: Results) -> str:
    """What the delta-preserving term does to KL and to the kept delta, with and without the gradients' side."""
    columns = ("bed", "feedback", "KL with the term to KL without", "kept delta without", "with")
    pairs = {"two-sided": (TERM_FEEDBACK_T, FEEDBACK_T), "one-sided": (TERM_ONE_SIDED_T, ONE_SIDED_T)}
    rows = []
    for name, bed in BEDS.items():
        for words, pair in pairs.items():
            term, plain = (row_of(beds[name], each.name) for each in pair)
            if term and plain:
                kept = [f"{beds[name]['rows'][each.name]['kept']:.3f}" for each in reversed(pair)]
                rows.append([bed.label, words, shown(ratio(term.kl, plain.kl), 3), *kept])
    return table(columns, rows, words=(0, 1))


def two_sides_block(beds: Mapping[str, Results], _: Results) -> str:
    """What gradients add to calibration."""
    columns = ("bed", "KL of two-sided to one-sided feedback", "to nearest of F", "to stochastic of T")
    rows = []
    for name, bed in BEDS.items():
        ours = row_of(beds[name], FEEDBACK_T.name)
        others = [row_of(beds[name], each) for each in (ONE_SIDED_T.name, NEAREST_F.name, STOCHASTIC)]
        if ours and any(others):
            rows.append(
                [bed.label, *(shown(ratio(ours.kl, other.kl), 3) if other else "" for other in others)]
            )
    return table(columns, rows)


def bars_block(beds: Mapping[str, Results], others: Results) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [[bar.claim, words[bar.passes], bar.found] for bar in bars(beds, others)]
    return table(("claim", "holds", "found"), rows, words=(0, 1, 2))


def machine_block(beds: Mapping[str, Results], _: Results) -> str:
    return "\n".join(machines(beds)) or NOT_MEASURED


def residual_block(beds: Mapping[str, Results], _: Results) -> str:
    columns = (
        "bed",
        "feedback of T",
        "codes chosen for the adapter, alone",
        "with the adapter",
        "ratio to feedback of T",
        "ratio to its file alone",
        "adapter",
    )
    rows = []
    for name, results in beds.items():
        names = (FEEDBACK_T.name, ALONE, RESIDUAL_T.name)
        plain, alone, repaired = (row_of(results, each) for each in names)
        if plain is None or alone is None or repaired is None:
            continue
        size = results["rows"][RESIDUAL_T.name]["residual"]["bytes"]
        means = [shown(mean([1000 * value for value in row.kl]), 3) for row in (plain, alone, repaired)]
        ratios = [shown(ratio(repaired.kl, row.kl)) for row in (plain, alone)]
        rows.append([BEDS[name].label, *means, *ratios, f"{size / 1e3:.0f} kB"])
    return (
        f"KL to T, 1/1000 nat a token, on held-out text, rank 16:\n\n{table(columns, rows)}"
        if rows
        else NOT_MEASURED
    )


def _spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """The median, and the least and the greatest of `values`."""
    low, middle, high = (form.format(value) for value in np.percentile(values, (0, 50, 100)))
    return f"{middle} ({low} to {high})"


def _with_sd(found: Mapping[str, float], form: str = "{:.3f}") -> str:
    return f"{form.format(found['mean'])} ± {form.format(found['sd'])}"


BLOCKS: Mapping[str, Callable[[Mapping[str, Results], Results], str]] = {
    "beds": beds_block,
    "dead_zone": dead_zone_block,
    "coupling": coupling_block,
    "objective": objective_block,
    "distributions": distributions_block,
    "decision": decision_block,
    "sizes": sizes_block,
    "strategies": strategies_block,
    "two_sides": two_sides_block,
    "delta_term": delta_term_block,
    "layers": layers_block,
    "cost": cost_block,
    "residual": residual_block,
    "bars": bars_block,
    "machine": machine_block,
    "methods": methods_block,
    "compared": compared_block,
    "rescalings": rescalings_block,
    "parameters": parameters_block,
    "formats_written": written_block,
    "formats_kept": kept_block,
    "formats_owners": owners_block,
}


# -- pictures ------------------------------------------------------------------------------------------------


INK, FAINT = "#30353a", "#b9bec4"
COLORS = dict(zip(BEDS, ("#1f6f8b", "#c8553d", "#7a9e3a", "#8a5a9e"), strict=True))


def draw_dead_zone(beds: Mapping[str, Results], others: Results, path: Path) -> None:
    """Kept share of nearest rounding of T against the delta-to-step ratio: formula, synthetic layers, real weights."""
    figure = Figure(figsize=(9, 5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    kurtoses = [0.0]
    for name, weights in _measured(beds):
        kurtoses += [weight["delta_kurtosis"] for weight in weights]
        places = [weight["ratio"] for weight in weights]
        kept = [weight["kept"] for weight in weights]
        axes.plot(places, kept, ".", color=COLORS[name], alpha=0.55, markersize=6, label=BEDS[name].label)
    ratios = np.geomspace(0.005, 1.2, 200)
    curve = [predicted_kept(float(ratio), NF4) for ratio in ratios]
    axes.plot(ratios, curve, color=INK, linewidth=1.5, label="formula, Gaussian delta")
    middle = float(np.median(kurtoses))
    curve = [predicted_kept(float(ratio), NF4, middle) for ratio in ratios]
    label = f"formula, delta with excess kurtosis {middle:.1f}, the median here"
    axes.plot(ratios, curve, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=label)
    if synthetic := others["synthetic"]:
        rows = synthetic["dead_zone"]
        axes.errorbar(
            [row["ratio"]["mean"] for row in rows],
            [row["nearest_T"]["mean"] for row in rows],
            yerr=[row["nearest_T"]["sd"] for row in rows],
            fmt="o", color=INK, markersize=4, capsize=2, mfc="white", label="synthetic layers, ± standard deviation",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(
        [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
        ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"],
    )
    axes.set_xlabel("size of the delta: mean |D| / mean step of the grid", color=INK)
    axes.set_title(
        "Share of the fine-tune that nearest rounding of T keeps", loc="left", fontsize=11, color=INK
    )
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def draw_strategies(beds: Mapping[str, Results], path: Path) -> None:
    """KL to T of every strategy, a panel a bed, with 95 % intervals."""
    figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2).flatten()
    for axes, (name, results) in zip(panels, beds.items(), strict=True):
        if row_of(results, "T") is None:
            axes.set_visible(False)
            continue
        found = [
            (label, mean(row.kl))
            for strategy, label in STRATEGIES.items()
            if strategy != "T" and (row := row_of(results, strategy)) is not None
        ]
        places = range(len(found))
        middle = np.array([estimate.value for _, estimate in found])
        ends = np.array([[estimate.low, estimate.high] for _, estimate in found]).reshape(-1, 2).T
        colors = [COLORS[name] if "feedback" in label else INK for label, _ in found]
        for place, value, low, high, color in zip(places, middle, *ends, colors, strict=True):
            axes.errorbar(
                value,
                place,
                xerr=[[value - low], [high - value]],
                fmt="o",
                color=color,
                capsize=2,
                markersize=5,
            )
            axes.annotate(
                f"{value:.2g}",
                (high, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
        axes.set_xscale("log")
        axes.set_xlim(right=4 * max(middle, default=1))
        axes.set_yticks(places, [label for label, _ in found], fontsize=8, color=INK)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="x", color=FAINT, linewidth=0.4)
        axes.set_title(BEDS[name].label, loc="left", fontsize=10, color=INK)
    figure.suptitle(
        "KL to the trained model T on held-out text, nats a token (less is better)", fontsize=11, color=INK
    )
    _save(figure, path, spines=("top", "right"))


def draw_distributions(beds: Mapping[str, Results], path: Path) -> None:
    """Kurtosis and largest entry of every adapted weight before merging, after it, and after nearest rounding."""
    figure = Figure(figsize=(10, 4.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    panels: Sequence[tuple[Any, str, str]] = (
        (left, "kurtosis", "kurtosis (normal: 3)"),
        (right, "largest", "largest entry, root mean squares"),
    )
    for axes, key, title in panels:
        ends: list[float] = []
        for name, weights in _measured(beds):
            before = [weight["shape_before"][key] for weight in weights]
            after = [weight["shape_of_target"][key] for weight in weights]
            axes.plot(before, after, ".", color=COLORS[name], alpha=0.5, label=BEDS[name].label)
            ends += before + after
        if ends:
            line = [min(ends) * 0.95, max(ends) * 1.05]
            axes.plot(line, line, color=FAINT, linewidth=1, zorder=0)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("base, before merging", color=INK)
        axes.set_ylabel("T, after merging", color=INK)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(
        "Merging does not make outliers: every adapted weight before and after", fontsize=11, color=INK
    )
    _save(figure, path)


def _measured(beds: Mapping[str, Results]) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Names and weights of the beds that have been measured."""
    return ((name, results["weights"]) for name, results in beds.items() if results.get("weights"))


def _save(figure: Figure, path: Path, spines: Sequence[str] = ("top", "right")) -> None:
    for axes in figure.axes:
        axes.spines[list(spines)].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    # No date in the file: the same results give the same picture.
    figure.savefig(path, dpi=144, metadata={"Software": None})


PICTURES: Mapping[str, Callable[[Mapping[str, Results], Results, Path], None]] = {
    "why-dead-zone.png": draw_dead_zone,
    "why-strategies.png": lambda beds, _, path: draw_strategies(beds, path),
    "why-distributions.png": lambda beds, _, path: draw_distributions(beds, path),
}


# -- pages ---------------------------------------------------------------------------------------------------


PAGE = ROOT / "docs/why-merging-loses-quality.md"
GUIDE = ROOT / "docs/guide-residual.md"
RESULTS_PAGE = ROOT / "docs/results.md"
AWQ_GUIDE = ROOT / "docs/guide-awq.md"
FORMATS_PAGE = ROOT / "docs/formats-compared.md"
PAGES = (PAGE, GUIDE, AWQ_GUIDE, RESULTS_PAGE, FORMATS_PAGE)
BLOCK = re.compile(r"(<!-- (\w+): made by tools/study/report -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(folder: Path) -> tuple[Mapping[str, Results], Results]:
    """Results of the beds by name; and of all else, empty where nothing was measured.

    That is: `synthetic` layers, the update by `sizes`, files beside those of other `methods`, AWQ files in
    `rescalings`, feedback with other `parameters`, every format beside its owner's library in `formats`, and by bed
    what `streamconv compare` found, `compared`.
    """
    beds = {name: load(folder / f"study-{name}.json") for name in BEDS}
    others = {
        "synthetic": load(folder / "study-synthetic.json"),
        "sizes": load(folder / "study-sizes.json").get("sizes", {}),
        "methods": load(folder / beside_methods.RESULT.name),
        "rescalings": load(folder / rescalings.RESULT.name),
        "parameters": load(folder / parameters.RESULT.name),
        "formats": load(folder / formats.RESULT.name),
        "compared": {name: load(folder / results_path(name).name) for name in AMOUNTS},
    }
    return beds, others


def render(page: str, folder: Path) -> str:
    """The page with its blocks made anew from the results in `folder`."""
    beds, others = read(folder)
    return BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]](beds, others)}\n\n{match[4]}", page)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/study/report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--bars", action="store_true", help="only print the checks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    beds, others = read(options.results)
    if options.bars:
        for bar in bars(beds, others):
            print({True: "pass", False: "FAIL", None: "    "}[bar.passes], f"{bar.claim}: {bar.found}")
        return
    for page in PAGES:
        before = page.read_text()
        made = render(before, options.results)
        if not options.check:
            page.write_text(made)
        elif made != before:
            sys.exit(f"{page} is out of date; run tools/study/report")
    for name, draw in () if options.check else PICTURES.items():
        draw(beds, others, PAGE.with_name(name))


if __name__ == "__main__":
    main()
