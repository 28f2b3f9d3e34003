"""The tables and sentences of docs/why-merging-loses-quality.md, from the results of the study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from streamconv.analysis.prediction import predicted_kept
from streamconv.comparison.bootstrap import Estimate, mean, perplexity, perplexity_difference, ratio
from streamconv.comparison.recommendation import recommend
from streamconv.comparison.result import row_of as compared_row
from streamconv.kernels.grids import NF4
from streamconv.rounding.adaptive import NEAREST_FROM
from streamconv.rounding.feedback import FeedbackOptions
from tools.study import cost
from tools.study.bars import ALONE, STOCHASTIC, Results, bars, row_of, shown
from tools.study.beds import (
    ADAPTIVE_T,
    BEDS,
    FEEDBACK,
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
)
from tools.study.beside_gptqmodel import CONTEST
from tools.study.beside_gptqmodel import FEEDBACK as FEEDBACK_OF_GPTQ
from tools.study.parameters import AS_IT_COMES, BY_PARAMETER, OPTIONS
from tools.study.prediction import predicted_share
from tools.study.rescalings import RESCALED, ROWS

NOT_MEASURED = "Not measured yet."
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
    return _table(columns, rows, words=(0, 4, 5))


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
            "0" if name == "T" else _thousandths(row.kl),
            f"{first['agreement']:.1%}",
            f"{first['kept']:.3f}" if "kept" in first else "",
            f"{100 * first['changed']:.2g} %" if "changed" in first else "",
        ]
        rows.append(cells)
    return f"**{label}**\n\n{_table(columns, rows)}"


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
    return _table(columns, rows)


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
    return f"{_table(columns, rows)}\n\n{said}"


def objective_block(_: Mapping[str, Results], others: Results) -> str:
    columns = ("rounding of T", "error of the output", "kept delta", "kept in the output")
    rows = []
    for name, row in others["synthetic"].get("compensated", {}).items():
        error = {key: 100 * value for key, value in row["output_error"].items()}
        kept = _with_sd(row["kept"]), _with_sd(row["kept_in_outputs"])
        rows.append([name, f"{_with_sd(error, '{:.2f}')} %", *kept])
    return _table(columns, rows)


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
    return f"{_table(columns, rows)}\n\nMedians over the adapted weights."


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
    return _table(columns, rows, words=(0, 3, 4, 5))


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
        said = [_thousandths(each) for each in kl]
        rows.append([factor, _spread(found["ratios"]), f"{found[NEAREST_T.name]['kept']:.1%}", *said])
    return _table(columns, rows)


def _thousandths(kl: Sequence[float]) -> str:
    return shown(mean([1000 * value for value in kl]))


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
    return _table(("layer", *(row.label for row in chosen)), cells)


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
    return _table(columns, rows, words=(0, 1))


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
    return _table(columns, rows)


def cost_block(beds: Mapping[str, Results], _: Results) -> str:
    options = FeedbackOptions()
    columns = (
        "model, tokens",
        *cost.operations(cost.DEMO, 1, options),
        "in all",
        "host and calls",
        *(f"in all, with {name}" for name, _ in cost.RATES),
    )
    rows = [_cost_row(cost.DEMO, 16_384, options, cost.GRADIENT_TOKENS)]
    rows += [
        _cost_row(large, 65_536, options, gradients)
        for large in cost.LARGE
        for gradients in (cost.GRADIENT_TOKENS, 0)
    ]
    numbers = ", ".join(f"{key} {value:g}" for key, value in asdict(options).items() if key != "searches")
    said = f"Options of feedback: {numbers}."
    row = beds["demo-kjv"].get("rows", {}).get(FEEDBACK_T.name)
    if row:
        parts = cost.operations(cost.DEMO, 16_384, options, on_gpu=False)
        said += (
            f" Measured: feedback of the demo model at 16,384 tokens took {row['wall_s'] / 60:.1f} minutes on 2 cores,"
            f" {row['cpu_s'] / 60:.1f} minutes of processor time. The operations counted here over that time are"
            f" {sum(parts.values()) / row['cpu_s'] / 1e9:.0f} GFLOP/s."
        )
    return f"{_table(columns, rows)}\n\n{said}"


def _cost_row(shapes: cost.Shapes, tokens: int, options: FeedbackOptions, gradients: int) -> Sequence[str]:
    parts = cost.operations(shapes, tokens, options, gradients=gradients)
    total, host = sum(parts.values()), cost.host_seconds(shapes, options, gradients)
    times = [_duration((total - parts["factors"]) / rate + host) for _, rate in cost.RATES]
    label = f"{shapes.name}, {tokens:,}" + ("" if gradients else ", no gradients")
    return (label, *map(_flops, parts.values()), _flops(total), _duration(host), *times)


def bars_block(beds: Mapping[str, Results], others: Results) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [[bar.claim, words[bar.passes], bar.found] for bar in bars(beds, others)]
    return _table(("claim", "holds", "found"), rows, words=(0, 1, 2))


def machine_block(beds: Mapping[str, Results], _: Results) -> str:
    return "\n".join(_machines(beds)) or NOT_MEASURED


def _machines(beds: Mapping[str, Results]) -> Iterator[str]:
    for name, results in beds.items():
        if machine := results.get("machine"):
            versions = ", ".join(
                f"{each} {machine[each]}" for each in ("torch", "bitsandbytes", "peft", "transformers")
            )
            yield f"- {name}: {machine['processor']}, {machine['cores']} cores; {versions}; commit {machine['commit']}"


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
        f"KL to T, 1/1000 nat a token, on held-out text, rank 16:\n\n{_table(columns, rows)}"
        if rows
        else NOT_MEASURED
    )


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
    (machine,) = _machines({"streamconv": results})
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
    ours = row_of(results, FEEDBACK_OF_GPTQ.name)
    rows = []
    for name, words in {"T": "T, merged in float32", **{row.name: row.label for row in CONTEST}}.items():
        if (row := row_of(results, name)) is None:
            continue
        found = results["rows"][name]
        again = shown(ratio(row.kl, ours.kl)) if ours and name not in ("T", FEEDBACK_OF_GPTQ.name) else ""
        cells = [
            words,
            f"{found['bits']:.2f}" if "bits" in found else "32",
            f"{perplexity(row.losses).value:.2f}",
            "0" if name == "T" else _thousandths(row.kl),
            f"{found['agreement']:.1%}",
            again,
            f"{found['cpu_s']:.0f}" if "cpu_s" in found else "",
        ]
        rows.append(cells)
    said = (
        f"{results['bed']['calibration_tokens']:,} tokens of calibration, groups of {results['group_size']}"
    )
    return f"**{label}** ({said})\n\n{_table(columns, rows)}"


def parameters_block(_: Mapping[str, Results], others: Results) -> str:
    beds = others["parameters"].get("beds", {})
    if not beds:
        return NOT_MEASURED
    rows = []
    for name in OPTIONS:
        cells = []
        for bed in BY_PARAMETER:
            row, usual = (beds.get(bed, {}).get(each) for each in (name, AS_IT_COMES))
            cells.append("" if row is None else _thousandths(row["kl"]))
            is_same = row is None or usual is None or name == AS_IT_COMES
            cells.append("" if is_same else shown(ratio(row["kl"], usual["kl"]), 3))
        rows.append([name, *cells])
    columns = [column for bed in BY_PARAMETER for column in (BEDS[bed].label, "to as it comes")]
    return _table(("feedback of T", *columns), rows)


def rescalings_block(_: Mapping[str, Results], others: Results) -> str:
    beds = others["rescalings"].get("beds", {})
    if not beds:
        return NOT_MEASURED
    rows = []
    for row in ROWS:
        found = [beds.get(name, {}).get(row.name) for name in RESCALED]
        cells = ["" if each is None else _thousandths(each["kl"]) for each in found]
        rows.append(["awq" if row.is_rescaled else "none", row.label, *cells])
    columns = ("`--rescale`", "`--rounding`", *(f"`{name}`" for name in RESCALED))
    return _table(columns, rows, (0, 1))


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
    recommended = recommend([compared_row(row) for row in found["rows"]], None)
    advice = [f"- {each.need}: `{each.name}`; {each.reason}" for each in recommended]
    facts = results["machine"]
    where = f"{facts['processor']}, {facts['cores']} cores; commit {facts['commit']}"
    parts = (
        said,
        _table(columns, rows, (0, 1)),
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


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Markdown; columns of `words` stand left, numbers right."""
    if not rows:
        return NOT_MEASURED
    rule = ["---" if place in words else "--:" for place in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def _spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """The median, and the least and the greatest of `values`."""
    low, middle, high = (form.format(value) for value in np.percentile(values, (0, 50, 100)))
    return f"{middle} ({low} to {high})"


def _with_sd(found: Mapping[str, float], form: str = "{:.3f}") -> str:
    return f"{form.format(found['mean'])} ± {form.format(found['sd'])}"


def _flops(count: float) -> str:
    return f"{count / 1e12:,.1f} T" if count < 1e15 else f"{count / 1e15:,.1f} P"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


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
    "gptqmodel": gptqmodel_block,
    "compared": compared_block,
    "rescalings": rescalings_block,
    "parameters": parameters_block,
}
