"""What was aimed at, beside what was measured: one row an aim, met or not, from the stored results alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tools.bench.encode import COMPILED, Case
from tools.bench.merge import COPY, STREAMCONV, ratio, to_bound
from tools.bench.plan import MEMORY_LIMIT
from tools.bench.rivals import RIVALS

Results = Mapping[str, Any]
# Of the medians over rounds, or of the highest, as each table has it.
TO_COPYING, TO_BOUND, TO_RIVALS, RIVALS_MEMORY, TO_BITSANDBYTES = 1.10, 1.15, 5.0, 7.0, 25.0
PEAK_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Aim:
    """`aimed` and `measured` as text; `is_met` by the numbers behind it."""

    what: str
    aimed: str
    measured: str
    is_met: bool


def aims(merge: Results, encode: Results, outofcore: Results, plan: Results) -> list[Aim]:
    return [*_merging(merge), *_encoding(encode), *_memory(outofcore), *_planning(plan)]


def _merging(results: Results) -> Iterator[Aim]:
    for group in results["groups"]:
        rows = {row["contender"]: row for row in group["medians"]}
        ours, where = rows[STREAMCONV], f"{group['kind'].replace('-', ' to ')}, {_size(group)}"
        if group["kind"] == "bf16-bf16":
            peak = ours["peak_bytes"]
            aim = _most(f"{where}: time to that of `{COPY}`", ours["to_copy"], TO_COPYING)
            yield replace(aim, measured=ratio(ours))
            yield Aim(f"{where}: peak memory above torch", "at most 512 MiB", _mib(peak), peak <= PEAK_BYTES)
            yield from _beside_rivals(where, rows)
        if "to_bound" in group:
            aim = _most(f"{where}: time to the longer of disk and encoder", group["to_bound"], TO_BOUND)
            ratios = to_bound(group).values()
            yield replace(aim, measured=f"{aim.measured} ({min(ratios):.2f} to {max(ratios):.2f})")


def _beside_rivals(where: str, rows: Mapping[str, Any]) -> Iterator[Aim]:
    """Beside a ratio of times is that of copying: what a merge that costs nothing more would come to."""
    ours = rows[STREAMCONV]
    for name in (RIVALS["peft"].name, RIVALS["loop"].name):
        if name in rows:
            theirs = rows[name]["wall_s"]
            aim = _least(f"{where}: time of {name} to ours", theirs / ours["wall_s"], TO_RIVALS)
            yield replace(aim, measured=f"{aim.measured} (`cp`: {theirs / rows[COPY]['wall_s']:.1f})")
            smaller = rows[name]["peak_bytes"] / max(ours["peak_bytes"], 1)
            yield _least(f"{where}: memory of {name} to ours", smaller, RIVALS_MEMORY)


def _encoding(results: Results) -> Iterator[Aim]:
    for row in results["medians"]:
        if row["case"] == Case("nf4").label and row["contender"] == COMPILED:
            threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
            what = f"quantizing to nf4 in memory, {threads}: speed to that of bitsandbytes"
            yield _least(what, row["to_bitsandbytes"], TO_BITSANDBYTES)


def _memory(results: Results) -> Iterator[Aim]:
    limit = _mib(results["limit_bytes"])
    for proof in results["proofs"]:  # of a run that the limit ended, nothing is stored
        what = f"{proof['input_bytes'] / 1e9:.0f} GB to {proof['output']} inside {limit}"
        yield Aim(what, "ends well", _mib(proof["anon_above_torch_bytes"]) + " above torch", True)


def _planning(results: Results) -> Iterator[Aim]:
    for row in results["rows"]:
        seconds = row["wall_s"] - row["start_s"]
        what = f"planning {row['model']} to {row['quant']}, start-up not counted"
        yield Aim(what, f"under {row['wall_limit_s']:g} s", f"{seconds:.1f} s", seconds < row["wall_limit_s"])
        peak, limit = row["peak_bytes"], MEMORY_LIMIT
        what = f"planning {row['model']} to {row['quant']}, peak memory above torch"
        yield Aim(what, f"under {limit / 1e6:.0f} MB", f"{peak / 1e6:.0f} MB", peak < limit)


def _most(what: str, measured: float, limit: float) -> Aim:
    return Aim(what, f"at most {limit:.2f}", f"{measured:.2f}", measured <= limit)


def _least(what: str, measured: float, limit: float) -> Aim:
    return Aim(what, f"at least {limit:g}", f"{measured:.1f}", measured >= limit)


def _size(group: Results) -> str:
    return f"{group['checkpoint_bytes'] / 1e9:.0f} GB"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def table(rows: list[Aim]) -> str:
    lines = ["| | aimed at | measured | |", "|---|--:|--:|---|"]
    lines += [
        f"| {row.what} | {row.aimed} | {row.measured} | {'met' if row.is_met else '**missed**'} |"
        for row in rows
    ]
    return "\n".join(lines)
