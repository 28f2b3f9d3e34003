"""Makes the tables of docs/reliability.md from the result files of the tools that tried to break things."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "docs" / "results"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(?:.*?<!-- end of table -->\n)?", re.DOTALL)
_END = "<!-- end of table -->\n"

Found = Mapping[str, Any]


def page(text: str) -> str:
    """The page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        file, lines = TABLES[match[2]]
        found = json.loads((RESULTS / file).read_text())
        return f"{match[1]}\n" + "\n".join(lines(found)) + f"\n\n{_END}"

    return _TABLE.sub(made, text)


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A table whose first column is text and whose others are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'--:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(map(_shown, row))} |"


def _shown(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _exits(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))


def _faults(found: Found) -> Iterator[str]:
    by_call: dict[str, list[Found]] = {}
    for row in found["table"]:
        by_call.setdefault(row["call"], []).append(row)
    commands = ", ".join(found["commands"])
    machine = found["machine"]
    yield (
        f"{found['faults']:,} faults in {commands}; {len(found['bad'])} of them bad. Linux {machine['kernel']}, "
        f"strace {machine['strace']}, Python {machine['python']}, torch {machine['torch']}."
    )
    yield ""
    rows = []
    for call, of_call in sorted(by_call.items()):
        errors = sorted({row["error"] for row in of_call})
        outcomes: Counter[str] = Counter()
        for row in of_call:
            outcomes.update(row["outcomes"])
        points = sum(sum(row["points"].values()) for row in of_call)
        rows.append(
            (f"`{call}`", " ".join(errors), points, _exits(outcomes), sum(row["bad"] for row in of_call))
        )
    yield from _rows(("call", "fault", "points", "exit code: how often", "bad"), rows)
    for reason, count in found["accepted"].items():
        yield from ("", f"Accepted, {count} times: {reason}.")


def _kills(found: Found) -> Iterator[str]:
    yield (
        f"{found['kills']:,} kills, {found['by_clock']:,} of them by the clock, {found['killed_again']:,} of a run "
        f"that went on after one; {len(found['failures'])} failures."
    )
    yield ""
    places = list(next(iter(found["by_command"].values())))
    rows = [
        (command, *(counts[place] for place in places)) for command, counts in found["by_command"].items()
    ]
    yield from _rows(("killed while", *places), rows)


def _hostile(content: Found) -> Iterator[str]:
    found = content["inputs"]
    refused = [row for row in found if row["exit"]]
    wrong = [row for row in found if row["exit"] != row["expected"]]
    yield (
        f"{len(found):,} hostile inputs, written by hand (`tools/hostile`, `docs/results/hostile-inputs.json` has each "
        f"with its exit code and sentence): {len(refused):,} refused, {len(found) - len(refused):,} taken as they may "
        f"be, {len(wrong)} other than expected. At most {max(row['cpu_seconds'] for row in found):.2f} s and "
        f"{max(row['memory_mb'] for row in found):,} MB above the process that had torch imported."
    )


def _fuzz(found: Found) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"{found['executions']:,} executions, {found['defects']} defects ({versions})."
    yield ""
    rows = [
        (name, row["executions"], _exits(row["outcomes"]), f"{row['slowest_s']:.2f}", row["peak_rss_mb"])
        for name, row in found["targets"].items()
    ]
    yield from _rows(("target", "executions", "outcomes", "slowest, s", "memory in all, MB"), rows)


def _hub(found: Found) -> Iterator[str]:
    yield (
        f"{found['cases']:,} cases, {len(found['faults'])} kinds of fault at {found['requests']} requests of a merge "
        f"and a push; {len(found['wrong'])} wrong. Exit codes: {_exits(found['exits'])}."
    )


def _flips(found: Found) -> Iterator[str]:
    ends = found["ends"]
    missed = found["flips"] - ends.get("found", 0) - ends.get("told", 0)
    yield (
        f"{found['flips']:,} flips: {ends['found']:,} found, {ends['told']:,} in files that people may edit, which are "
        f"named as changed, {missed} missed. Exit codes: {_exits(found['exits'])}."
    )


TABLES: Mapping[str, tuple[str, Callable[[Any], Iterator[str]]]] = {
    "faults": ("faults.json", _faults),
    "kills": ("kills.json", _kills),
    "hostile": ("hostile-inputs.json", _hostile),
    "fuzz": ("fuzz.json", _fuzz),
    "hub": ("hub-faults.json", _hub),
    "flips": ("flips.json", _flips),
}
"""Result file and lines of each table, by the name that stands in the page."""
