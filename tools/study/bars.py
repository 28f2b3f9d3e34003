"""What the study must show, as checks on its numbers: each passes or not, with the numbers that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamconv.comparison.bootstrap import Estimate, difference, loss_removed, perplexity_difference, ratio
from tools.study.beds import (
    BEDS,
    FEEDBACK_F,
    FEEDBACK_T,
    NEAREST_F,
    NEAREST_T,
    ONE_SIDED_T,
    RESIDUAL_T,
    STOCHASTIC_T,
    TERM_FEEDBACK_T,
    TERM_ONE_SIDED_T,
    Merged,
)
from tools.study.beside_gptqmodel import AS_IT_COMES, CONTESTED, FEEDBACK, THEIRS
from tools.study.prediction import ERASED, predicted_share

STOCHASTIC = "stochastic-T"
# Of the list of `streamconv compare`: in the format that training had the base in.
NF4_OF_T = ("nearest-T", "stochastic-T", "search-T", "feedback-T", "feedback-T-delta")
ALONE = f"{RESIDUAL_T.name}-alone"
MOST_MINUTES = 10

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """`passes` is None where what it needs has not been measured yet."""

    claim: str
    passes: bool | None
    found: str


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
    yield from _beside_gptqmodel(others["gptqmodel"])
    for name, found in others["compared"].items():
        yield from _compared(name, found)
    yield _exact(beds)
    yield _cost(demo)


def shown(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _with(claim: str, found: Mapping[str, Row | None], say: Callable[..., tuple[bool, str]]) -> Bar:
    """The bar whose rows are `found`, once all of them are there."""
    missing = [name for name, row in found.items() if row is None]
    if missing:
        return Bar(claim, None, f"not measured yet: {', '.join(missing)}")
    return Bar(claim, *say(*found.values()))


def _rows(results: Results, *names: str) -> dict[str, Row | None]:
    return {name: row_of(results, name) for name in names}


def _removed(results: Results, name: str, least: float) -> Bar:
    def say(row: Row, nearest: Row, trained: Row) -> tuple[bool, str]:
        share = loss_removed(row.losses, nearest.losses, trained.losses)
        return share.value >= least, percent(share)

    claim = f"demo-kjv: {name} removes at least {least:.0%} of the loss of nearest of T"
    return _with(claim, _rows(results, name, NEAREST_T.name, "T"), say)


def _closer_by_the_delta_term(results: Results, ours: Merged, other: Merged) -> Bar:
    def say(term: Row, plain: Row) -> tuple[bool, str]:
        share, gap = ratio(term.kl, plain.kl), difference(term.kl, plain.kl)
        said = f"ratio {shown(share, 3)}, difference {shown(gap, 5)}"
        return share.value <= 0.75 and gap.excludes(0), said

    claim = (
        f"demo-kjv: KL to T of {ours.name} is at most 0.75 times that of {other.name}, the difference not 0"
    )
    return _with(claim, _rows(results, ours.name, other.name), say)


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
    return _with(claim, _rows(results, "T", *names), say)


def _erased_as_predicted(label: str, results: Results) -> Bar:
    """Erased: nearest of T keeps under `ERASED` of what the fine-tune gained over the nf4 base, in log perplexity."""

    def say(trained: Row, base: Row, nearest: Row) -> tuple[bool, str]:
        levels = [np.mean(row.losses) for row in (trained, base, nearest)]
        measured = float((levels[1] - levels[2]) / (levels[1] - levels[0]))
        predicted = predicted_share(results["weights"])
        said = f"predicted kept share {predicted:.1%}, kept of the gain {measured:.1%}"
        return (predicted < ERASED) == (measured < ERASED), said

    claim = f"{label}: nearest of T erases (keeps under {ERASED:.0%}) exactly where predicted"
    return _with(claim, _rows(results, "T", "base-nf4", NEAREST_T.name), say)


def _half_the_kl(label: str, results: Results, feedback: Merged, other: str, words: str) -> Bar:
    def say(ours: Row, theirs: Row) -> tuple[bool, str]:
        share = ratio(ours.kl, theirs.kl)
        return share.value <= 0.5, f"ratio {shown(share, 3)}"

    claim = f"{label}: KL to T of {feedback.name} is at most half of that of {words}"
    return _with(claim, _rows(results, feedback.name, other), say)


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


def _beside_gptqmodel(results: Results) -> Iterator[Bar]:
    """Of GPTQModel that counts which does best, of what was measured, on the very text that both are judged by."""
    for name in CONTESTED:
        found = results.get("beds", {}).get(name, {})
        theirs = [row for each in THEIRS if (row := row_of(found, each.name))]

        def say(ours: Row, _: Row, theirs: Sequence[Row] = tuple(theirs)) -> tuple[bool, str]:
            shares = [ratio(ours.kl, each.kl) for each in theirs]
            most = max(shares, key=lambda share: share.value)
            return most.value <= 1, f"ratio to the best of {len(theirs)} ways: {shown(most, 3)}"

        claim = (
            f"{BEDS[name].label}: KL to T of the GPTQ file of feedback of T is not above that of GPTQModel's"
        )
        yield _with(claim, _rows(found, FEEDBACK.name, AS_IT_COMES.name), say)


def _compared(name: str, results: Results) -> Iterator[Bar]:
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
