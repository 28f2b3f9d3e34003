"""Tables and checks of what `tools/study/formats` found, for docs/formats-compared.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean
from typing import Any

from streamconv.comparison.bootstrap import Estimate, difference, ratio
from streamconv.formats import FORMATS
from streamconv.formats.gguf import PREFIX
from tools.study.beds import BEDS, NOT_MEASURED, Results, machines, table
from tools.study.formats import AUTO, FEEDBACK, KEPT, NEAREST, OWNER, SEARCH, SIXTEEN_BIT, STUDIED, WRITTEN

Cells = Mapping[str, Any]
NOTHING = "-"
REFERENCES = {WRITTEN: "kl_T", KEPT: "kl_own"}


def contender(name: str, part: str) -> str:
    """The way that stands beside the owner's nearest rounding.

    llama.cpp's quantizer searches for the scales of its K types: beside what it writes of a 16-bit base stands our
    search.
    """
    searches = part == WRITTEN and name.startswith(PREFIX) and "_k" in name
    return SEARCH if searches else NEAREST


def found(cells: Cells, part: str, name: str, way: str) -> Any:
    """A cell's row, or None where there is none or the format refused it."""
    row = cells.get(f"{part}/{name}/{way}")
    return None if row is None or "refused" in row else row


# Chance of rounding: files of one library, of weights that differ by less than bfloat16 tells apart, differ in KL by so
# much (six files of MLX on the smaller bed: 0.6 % in standard deviation).
CHANCE = 0.02
# Of squared errors, which hardly depend on chance.
SAME_ERROR = 1.001


@dataclass(frozen=True, slots=True)
class Comparison:
    """KL of a file of ours minus that of the owner's, of the same text, nats a token; `theirs` is the owner's.

    `errors` is the squared error of our weights over that of the owner's; None where that was not measured.
    """

    difference: Estimate
    theirs: float
    errors: float | None

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval says so and it is more than chance, or errors of the weights are larger."""
        is_farther = self.difference.low > 0 and self.difference.value > CHANCE * self.theirs
        return is_farther or (self.errors is not None and self.errors > SAME_ERROR)


def comparisons(cells: Cells, part: str) -> Iterator[tuple[str, Comparison]]:
    """Ours beside the owner's by format, both to the same T."""
    key = REFERENCES[part]
    for name in FORMATS:
        ours, theirs = found(cells, part, name, contender(name, part)), found(cells, part, name, OWNER)
        if ours and theirs:
            # On a base's own grid the least squared error is to leave it as it is, without the update.
            errors = _errors(ours, theirs) if part == WRITTEN else None
            yield name, Comparison(difference(ours[key], theirs[key]), fmean(theirs[key]), errors)


def _errors(ours: Any, theirs: Any) -> float | None:
    both = [row.get("squared_error") for row in (ours, theirs)]
    return both[0] / both[1] if all(both) else None


def is_judged(bed: str, name: str) -> bool:
    """Whether a format's files say on a bed whose quantizer is better.

    SmolLM2 was expanded from blocks of 32 with 16 steps. Its rows are no whole super-blocks, so that files of K types
    are mostly of q5_0 and q5_1, whose blocks are those: the better scales are searched for, the nearer do they come to
    the grid that the base lies on, without the update.
    """
    return bed != "demo-kjv" or not (name.startswith(PREFIX) and "_k" in name)


def gains(cells: Cells, part: str) -> Iterator[tuple[str, Estimate]]:
    """By format, KL of feedback with text over that of the nearest of ours without."""
    key = REFERENCES[part]
    for name in FORMATS:
        ours, text = found(cells, part, name, contender(name, part)), found(cells, part, name, FEEDBACK)
        if ours and text:
            yield name, ratio(text[key], ours[key])


# -- tables --------------------------------------------------------------------------------------------------


def written_block(_: Mapping[str, Results], others: Results) -> str:
    """The 16-bit base merged and written to each format, a table for each bed."""
    return _by_bed(others["formats"], _written)


def kept_block(_: Mapping[str, Results], others: Results) -> str:
    """Each format as a base, merged to bfloat16 and to itself, a table for each bed."""
    return _by_bed(others["formats"], _kept)


def owners_block(_: Mapping[str, Results], others: Results) -> str:
    """Who wrote the owners' files, with which versions, and on which machine."""
    results = others["formats"]
    if not results:
        return NOT_MEASURED
    by_owner: dict[str, str] = {}
    for bed in results["beds"].values():
        for row in bed["cells"].values():
            if "versions" in row:
                by_owner[row["by"]] = row["versions"]
    lines = [f"- {owner}: {versions}" for owner, versions in sorted(by_owner.items())]
    return "\n".join([*lines, *machines({"streamconv": results})])


def _by_bed(results: Results, rows: Callable[[Cells], str]) -> str:
    if not results:
        return NOT_MEASURED
    parts = []
    for name, bed in results["beds"].items():
        about = bed["bed"]
        text = f"{about['windows']} x {about['tokens']} tokens of held-out text"
        calibration = f"{about['calibration_tokens']:,} of calibration"
        parts.append(f"**{BEDS[name].label}** ({text}, {calibration})\n\n{rows(bed['cells'])}")
    return "\n\n".join(parts)


def _written(cells: Cells) -> str:
    columns = (
        "format",
        "bits",
        "owner",
        "KL to T: ours, nearest",
        "the owner's",
        "ours, without text",
        "ours, with text",
        "ours to the owner's",
        "perplexity: nearest, owner's, with text",
        "kept: nearest, owner's, with text",
    )
    shares = dict(comparisons(cells, WRITTEN))
    rows = []
    for name in FORMATS:
        nearest, theirs = (found(cells, WRITTEN, name, way) for way in (contender(name, WRITTEN), OWNER))
        auto, text = (found(cells, WRITTEN, name, way) for way in (AUTO, FEEDBACK))
        if nearest is None:
            continue
        ways = (nearest, theirs, text)
        cells_of = [
            f"`{name}`",
            f"{nearest['bits']:.2f}",
            theirs["by"] if theirs else NOTHING,
            *(_kl(row, "kl_T") for row in (nearest, theirs, auto, text)),
            _beside(shares.get(name)),
            _together(_perplexity, ways),
            _together(_share, ways),
        ]
        rows.append(cells_of)
    return _table(columns, rows)


def _kept(cells: Cells) -> str:
    columns = (
        "base",
        "to bfloat16: KL to T",
        "to its own T",
        "kept format, KL to its own T: ours, nearest",
        "the owner's",
        "ours, without text",
        "ours, with text",
        "ours to the owner's",
        "perplexity: nearest, owner's, without text, with text",
        "kept: nearest, owner's, without text, with text",
    )
    shares = dict(comparisons(cells, KEPT))
    rows = []
    for name in FORMATS:
        dense, theirs = (found(cells, KEPT, name, way) for way in (SIXTEEN_BIT, OWNER))
        nearest, auto, text = (
            found(cells, KEPT, name, way) for way in (contender(name, KEPT), AUTO, FEEDBACK)
        )
        if dense is None:
            continue
        ways = (nearest, theirs, auto, text)
        cells_of = [
            f"`{name}`",
            _kl(dense, "kl_T"),
            _kl(dense, "kl_own"),
            *(_kl(row, "kl_own") for row in ways),
            _beside(shares.get(name)),
            _together(_perplexity, ways),
            _together(_share, ways),
        ]
        rows.append(cells_of)
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = [place for place, name in enumerate(columns) if name in ("format", "owner", "base")]
    return table(columns, rows, words)


def _kl(row: Any, key: str) -> str:
    if row is None:
        return NOTHING
    value = 1000 * fmean(row[key])
    return f"{value:.2f}" if value >= 0.005 else "0.00"


def _perplexity(row: Any) -> str:
    return NOTHING if row is None else f"{exp(fmean(row['losses'])):.2f}"


def _together(show: Callable[[Any], str], rows: Sequence[Any]) -> str:
    """What is shown of rows, in one cell; of a format that has none of them but the first, that alone."""
    shown = [show(row) for row in rows]
    return shown[0] if set(shown[1:]) == {NOTHING} else " / ".join(shown)


def _share(row: Any) -> str:
    return NOTHING if row is None else f"{row['kept']:.1%}"


def _beside(compared: Comparison | None) -> str:
    """A difference of KL in 1/1000 nat with its interval; `same` where files hold the same values."""
    if compared is None:
        return NOTHING
    estimate = compared.difference
    value, low, high = (1000 * each for each in (estimate.value, estimate.low, estimate.high))
    if value == low == high == 0:
        return "same"
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def measured_beds(results: Results) -> Iterator[tuple[str, Cells]]:
    """Cells of every bed that has any."""
    for name in STUDIED:
        if name in results.get("beds", {}):
            yield name, results["beds"][name]["cells"]
