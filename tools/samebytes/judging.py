"""What both trees answered and wrote, as a line of the table; a failure is never a skip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.samebytes.cases import Case
from tools.samebytes.trees import compare

GOOD = ("same", "refused", "new")
NAMED = 3
UNKNOWN_BASES = "unknown-bases.json"

Answers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """Line of the table: `verdict` is same, refused (by both, as expected), new (of a method or format
    that REV has none of), DIFFERS or FAILED.
    """

    name: str
    files: int
    nbytes: int
    verdict: str
    what: str

    @property
    def is_good(self) -> bool:
        return self.verdict in GOOD


def judge(case: Case, work: Path, now: Answers, rev: Answers) -> Row:
    """Compare what both trees answered, and what they wrote."""
    ours, theirs = now.get(case.name), rev.get(case.name)
    if case.base in unknown_bases(work):
        return Row(case.name, 0, 0, "new", "REV cannot make its base")
    if ours is None or theirs is None:
        return Row(case.name, 0, 0, "FAILED", "a tree ended before it came to this output")
    failed = [
        f"{tree}: {_last_line(answer['says'])}"
        for tree, answer in (("the working tree", ours), ("REV", theirs))
        if answer["outcome"] == "failed"
    ]
    if failed:
        return Row(case.name, 0, 0, "FAILED", failed[0])
    is_new = ours["outcome"] == "made" and (_has_no_method(theirs, case.method) or knows_no_format(theirs))
    refused = [answer["outcome"] == "refused" for answer in (ours, theirs)]
    if not is_new and (any(refused) or case.refused):
        return _judge_refusal(case, ours["says"], theirs["says"], all(refused))
    found = compare(work / "now" / case.name, work / "rev" / case.name)
    if is_new or not found.files:
        what = "REV knows no such method or format" if found.files else "nothing was written"
        return Row(case.name, found.files, found.nbytes, "new" if found.files else "FAILED", what)
    more = f"; {len(found.found) - NAMED} further files" if len(found.found) > NAMED else ""
    what = "; ".join(found.found[:NAMED]) + more
    return Row(case.name, found.files, found.nbytes, "DIFFERS" if found.found else "same", what)


def knows_no_format(answer: Mapping[str, Any]) -> bool:
    """Whether a tree has refused an output, or a base, because it has no format of that name."""
    return answer["says"].startswith("OptionError: --quant ") and " is not known; use " in answer["says"]


def unknown_bases(work: Path) -> frozenset[str]:
    """Quantized bases that REV does not write."""
    path = work / UNKNOWN_BASES
    return frozenset(json.loads(path.read_text())) if path.exists() else frozenset()


def _has_no_method(answer: Mapping[str, Any], method: str) -> bool:
    """Whether a tree has refused an adapter because it knows of the method and cannot merge it."""
    return (
        answer["says"].startswith("UnsupportedError: ")
        and f": {method} adapters are not supported yet" in answer["says"]
    )


def _judge_refusal(case: Case, ours: str, theirs: str, by_both: bool) -> Row:
    if not by_both:
        said = f"the working tree: {ours or 'made it'}; REV: {theirs or 'made it'}"
        return Row(case.name, 0, 0, "DIFFERS", said)
    if case.refused is None or not theirs.startswith(f"{case.refused}:"):
        return Row(case.name, 0, 0, "FAILED", f"both refuse, which was not expected: {theirs}")
    if ours != theirs:
        return Row(case.name, 0, 0, "DIFFERS", f"refused as {ours}; REV: {theirs}")
    return Row(case.name, 0, 0, "refused", case.refused)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no words"


def table(rows: Sequence[Row]) -> str:
    """Lines of equal columns."""
    cells = [("output", "files", "bytes", "verdict", "what differs")]
    cells += [(row.name, str(row.files), f"{row.nbytes:,}", row.verdict, row.what) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {files:>{widths[1]}}  {nbytes:>{widths[2]}}  {verdict:<{widths[3]}}  {what}".rstrip()
        for name, files, nbytes, verdict, what in cells
    )
