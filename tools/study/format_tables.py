"""Tables and checks of what `tools/study/formats` found, for docs/formats-compared.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from streamconv.comparison.bootstrap import Estimate, difference, mean, perplexity, ratio
from streamconv.formats import FORMATS
from streamconv.formats.gguf import PREFIX
from tools.study.beds import BEDS, NOT_MEASURED, Results, machines, table
from tools.study.formats import AUTO, FEEDBACK, KEPT, NEAREST, OWNER, SIXTEEN_BIT, STUDIED, WRITTEN

Cells = Mapping[str, Any]
NOTHING = "-"
REFERENCES = {WRITTEN: "kl_T", KEPT: "kl_own"}


def contender(name: str) -> str:
    """The way that stands beside the owner's nearest rounding.

    llama.cpp's quantizer searches for scales: beside it stands the search that streamconv takes without being asked.
    """
    return AUTO if name.startswith(PREFIX) else NEAREST


def found(cells: Cells, part: str, name: str, way: str) -> Any:
    """A cell's row, or None where there is none or the format refused it."""
    row = cells.get(f"{part}/{name}/{way}")
    return None if row is None or "refused" in row else row


def differences(cells: Cells, part: str) -> Iterator[tuple[str, Estimate]]:
    """By format, KL of ours minus that of the owner's, both to the same T, of the same text; nats a token."""
    key = REFERENCES[part]
    for name in FORMATS:
        ours, theirs = found(cells, part, name, contender(name)), found(cells, part, name, OWNER)
        if ours and theirs:
            yield name, difference(ours[key], theirs[key])


def gains(cells: Cells, part: str) -> Iterator[tuple[str, Estimate]]:
    """By format, KL of feedback with text over that of the best without text of ours."""
    key = REFERENCES[part]
    for name in FORMATS:
        ours, text = found(cells, part, name, contender(name)), found(cells, part, name, FEEDBACK)
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
        "perplexity: nearest",
        "the owner's",
        "with text",
        "kept: nearest",
        "the owner's",
        "with text",
    )
    shares = dict(differences(cells, WRITTEN))
    rows = []
    for name in FORMATS:
        nearest, theirs = (found(cells, WRITTEN, name, way) for way in (NEAREST, OWNER))
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
            *(_perplexity(row) for row in ways),
            *(_share(row) for row in ways),
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
        "perplexity: nearest",
        "without text",
        "with text",
        "kept: nearest",
        "the owner's",
        "without text",
        "with text",
    )
    shares = dict(differences(cells, KEPT))
    rows = []
    for name in FORMATS:
        dense, theirs = (found(cells, KEPT, name, way) for way in (SIXTEEN_BIT, OWNER))
        nearest, auto, text = (found(cells, KEPT, name, way) for way in (NEAREST, AUTO, FEEDBACK))
        if dense is None:
            continue
        cells_of = [
            f"`{name}`",
            _kl(dense, "kl_T"),
            _kl(dense, "kl_own"),
            *(_kl(row, "kl_own") for row in (nearest, theirs, auto, text)),
            _beside(shares.get(name)),
            *(_perplexity(row) for row in (nearest, auto, text)),
            *(_share(row) for row in (nearest, theirs, auto, text)),
        ]
        rows.append(cells_of)
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = [place for place, name in enumerate(columns) if name in ("format", "owner", "base")]
    return table(columns, rows, words)


def _kl(row: Any, key: str) -> str:
    if row is None:
        return NOTHING
    value = 1000 * mean(row[key]).value
    return f"{value:.2f}" if value >= 0.005 else "0.00"


def _perplexity(row: Any) -> str:
    return NOTHING if row is None else f"{perplexity(row['losses']).value:.2f}"


def _share(row: Any) -> str:
    return NOTHING if row is None else f"{row['kept']:.1%}"


def _beside(estimate: Estimate | None) -> str:
    """A difference of KL in 1/1000 nat with its interval; `same` where files hold the same values."""
    if estimate is None:
        return NOTHING
    value, low, high = (1000 * each for each in (estimate.value, estimate.low, estimate.high))
    if value == low == high == 0:
        return "same"
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def measured_beds(results: Results) -> Iterator[tuple[str, Cells]]:
    """Cells of every bed that has any."""
    for name in STUDIED:
        if name in results.get("beds", {}):
            yield name, results["beds"][name]["cells"]
