"""docs/benchmarks.md from what was measured: every number between its marks comes from docs/results/*.json.

A block of the page stands between `<!-- NAME: made by tools/bench/report -->` and `<!-- end -->`; the words around
blocks are written by hand. `--check` writes nothing and ends with 1 if a block is not what the results say.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools.bench import calibration, encode, formats, methods, outofcore, peaks, plan
from tools.bench.merge import COPY, RAW, RIVALS, STREAMCONV, ratio, table, to_bound
from tools.bench.results import RESULTS, ROOT, load

PAGE = ROOT / "docs/benchmarks.md"
PICTURE = ROOT / "docs/benchmarks.png"
MERGED = "bench-merge.json"
NOT_MEASURED = "Not measured yet."
BLOCK = re.compile(r"(<!-- (\w+): made by tools/bench/report -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Results = Mapping[str, Any]


# -- aims --------------------------------------------------------------------------------------------------------
#
# What was aimed at, beside what was measured: one row an aim, met or not, from the stored results alone.

# Of the medians over rounds, or of the highest, as each table has it.
TO_COPYING, TO_COPYING_LOADED, CPU_S_PER_GB, PEAK_BYTES = 0.90, 1.10, 1.2, 512 * 2**20
TO_BOUND, TO_RIVALS, RIVALS_MEMORY, TO_BITSANDBYTES = 1.15, 5.0, 7.0, 25.0


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
        where += f", {group['load']} busy beside" if group.get("load") else ""
        if group["kind"] == "bf16-bf16":
            peak, limit = ours["peak_bytes"], TO_COPYING_LOADED if group.get("load") else TO_COPYING
            aim = _most(f"{where}: time to that of `{COPY}`", ours["to_copy"], limit)
            yield replace(aim, measured=ratio(ours))
            cpu_s = ours["cpu_s"] / group["checkpoint_bytes"] * 1e9
            yield _most(f"{where}: CPU-s/GB", cpu_s, CPU_S_PER_GB)
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
        if row["case"] == encode.Case("nf4").label and row["contender"] == encode.COMPILED:
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
        peak, limit = row["peak_bytes"], plan.MEMORY_LIMIT
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


def aims_table(rows: list[Aim]) -> str:
    lines = ["| | aimed at | measured | |", "|---|--:|--:|---|"]
    lines += [
        f"| {row.what} | {row.aimed} | {row.measured} | {'met' if row.is_met else '**missed**'} |"
        for row in rows
    ]
    return "\n".join(lines)


# -- blocks of the page ------------------------------------------------------------------------------------------


def merge_block(results: Results) -> str:
    """A table for each kind and size, and what it says of streamconv."""
    parts = []
    for group in results["groups"]:
        rounds = 1 + max(run["round"] for run in group["runs"])
        left_out = "".join(f" {name} is left out: {why}." for name, why in group["left_out"].items())
        fewest = min(Counter(run["contender"] for run in group["runs"]).values())
        some = f"Rivals took part in {fewest} of them." if fewest < rounds else ""
        counted = f"{rounds} round{'s' * (rounds > 1)}."
        said = " ".join(filter(None, (counted, some, f"{_against(group)}{left_out}")))
        parts.append(f"{table(group)}\n\n{said}\n{_machine(group)}")
    return "\n\n".join(parts)


def _against(group: Results) -> str:
    """How the rivals and the bound compare with streamconv, in words."""
    rows = {row["contender"]: row for row in group["medians"]}
    ours = rows[STREAMCONV]
    said = [
        f"{name} takes {row['wall_s'] / ours['wall_s']:.1f} times as long as streamconv and"
        f" {row['peak_bytes'] / max(ours['peak_bytes'], 1):.0f} times its memory."
        for name, row in rows.items()
        if name not in {COPY, RAW, STREAMCONV}
    ]
    if "to_bound" in group:
        said.append(
            f"The encoder alone takes in {group['encoder_bytes_per_s'] / 1e9:.2f} GB/s; streamconv takes"
            f" {group['to_bound']:.2f} times the longer of disk and encoder."
        )
    return " ".join(said)


def plan_block(results: Results) -> str:
    return "\n".join([*plan.HEADER, *map(plan.row, results["rows"]), "", _machine(results)])


def outofcore_block(results: Results) -> str:
    limit = f"{results['limit_bytes'] / 2**20:.0f} MiB of memory, limited by {results['limited_by']}"
    how = f"{results['layers']} layers of {results['model']}, inside {limit}."
    return "\n".join(
        [*outofcore.HEADER, *map(outofcore.row, results["proofs"]), "", f"{how}\n{_machine(results)}"]
    )


def encode_block(results: Results) -> str:
    rows, columns = results["shape"]
    how = f"A weight of {rows:,} x {columns:,}; medians of {results['rounds']} rounds."
    measured = [encode.Row(**row) for row in results["medians"]]
    return "\n".join([encode.table(measured), "", f"{how}\n{_machine(results)}"])


def formats_block(results: Results) -> str:
    """The table, and how many of its rows meet the aim."""
    rows, columns = results["shape"]
    measured = [formats.Row(**row) for row in results["medians"]]
    met = sum(row.is_met for row in measured)
    clock = "" if results["clock"] == "wall" else ", in seconds of processors"
    how = (
        f"{met} of {len(measured)} met. A weight of {rows:,} x {columns:,}, {results['threads']} threads; medians of up"
        f" to {results['rounds']} rounds{clock}."
    )
    return "\n".join([formats.table(measured), "", f"{how}\n{_machine(results)}"])


def calibration_block(results: Results) -> str:
    return "\n".join([*calibration.HEADER, *map(calibration.row, results["peaks"]), "", _machine(results)])


def methods_block(results: Results) -> str:
    return "\n".join([*methods.HEADER, *map(methods.row, results["rows"]), "", _machine(results)])


def peaks_block(results: Results) -> str:
    return "\n".join([*peaks.HEADER, *peaks.lines(results["rows"]), "", _machine(results)])


def _machine(results: Results) -> str:
    """The machine of a result, in one line."""
    machine = results["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "peft", "transformers") if name in machine
    )
    return (
        f"({machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, Linux"
        f" {machine['kernel']}, {machine['file_system']}; Python {machine['python']}, {versions}; commit"
        f" {machine['commit']})"
    )


def aims_block(*results: Results) -> str:
    return aims_table(aims(*results))


# Of each block, what it is made from, in `RESULTS`.
BLOCKS: Mapping[str, tuple[Sequence[str], Callable[..., str]]] = {
    "aims": (
        (MERGED, "bench-encode.json", "bench-outofcore.json", "bench-plan.json"),
        aims_block,
    ),
    "merge": ((MERGED,), merge_block),
    "encode": (("bench-encode.json",), encode_block),
    "formats": (("bench-formats.json",), formats_block),
    "outofcore": (("bench-outofcore.json",), outofcore_block),
    "plan": (("bench-plan.json",), plan_block),
    "methods": (("bench-methods.json",), methods_block),
    "peaks": (("bench-peaks.json",), peaks_block),
    "calibration": (("bench-calibration.json",), calibration_block),
}


def render(page: str, folder: Path) -> str:
    """The page with its blocks made anew from the results in `folder`."""

    def block(match: re.Match[str]) -> str:
        names, make = BLOCKS[match[2]]
        results = [load(folder / name) for name in names]
        return f"{match[1]}{make(*results) if all(results) else NOT_MEASURED}\n{match[4]}"

    return BLOCK.sub(block, page)


# -- the picture ------------------------------------------------------------------------------------------------

OURS, THEIRS, INK = "#1f6f8b", "#b9bec4", "#30353a"


def bars(results: Results) -> list[tuple[str, Results]]:
    """What the picture shows of bf16 to bf16: streamconv at every size, then what ran beside it, fastest first."""
    groups = [group for group in results["groups"] if group["kind"] == "bf16-bf16" and not group.get("load")]
    ours, others = [], {}
    for group in groups:
        for row in group["medians"]:
            if row["contender"] == STREAMCONV:
                ours.append((f"streamconv, {group['checkpoint_bytes'] / 1e9:.0f} GB", row))
            elif row["contender"] != COPY:
                label = f"{row['contender']}, {group['checkpoint_bytes'] / 1e9:.0f} GB"
                others[label] = row
    return [*ours, *sorted(others.items(), key=lambda item: float(item[1]["to_copy"]))]


def draw(results: Results, path: Path) -> None:
    """Two panels of bars: time against copying, with the range over rounds, and peak memory."""
    from matplotlib.figure import Figure  # an extra that only drawing needs

    shown = bars(results)
    figure = Figure(figsize=(10, 1.3 + 0.42 * len(shown)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    colors = [OURS if name.startswith("streamconv") else THEIRS for name, _ in shown]
    ratios = [row["to_copy"] for _, row in shown]
    ranges = [
        [row["to_copy"] - row["fastest"] for _, row in shown],
        [row["slowest"] - row["to_copy"] for _, row in shown],
    ]
    left.barh(
        places, ratios, color=colors, xerr=ranges, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2}
    )
    left.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    left.set_title(
        "time, as a multiple of copying the files (dashed)", fontsize=10, loc="left", color=INK, pad=8
    )
    _label(left, places, [f"{ratio:.2f}" for ratio in ratios], [row["slowest"] for _, row in shown])
    mebibytes = [row["peak_bytes"] / 2**20 for _, row in shown]
    right.barh(places, mebibytes, color=colors)
    right.set_title("peak memory above Python with torch, MiB", fontsize=10, loc="left", color=INK, pad=8)
    _label(right, places, [f"{size:,.0f}" for size in mebibytes], mebibytes)
    left.set_yticks(places, [name for name, _ in shown], fontsize=9, color=INK)
    left.invert_yaxis()
    figure.suptitle(
        "Merging LoRA of rank 16 on all linear layers, bf16 to bf16, on the CPU", fontsize=11, color=INK
    )
    # No date in the file: the same results give the same picture.
    figure.savefig(path, dpi=144, metadata={"Software": None})


def _label(axes: Any, places: Sequence[int], texts: Sequence[str], ends: Sequence[float]) -> None:
    """Numbers beside the bars, in place of an axis."""
    gap = 0.015 * max(ends)
    for place, text, end in zip(places, texts, ends, strict=True):
        axes.text(end + gap, place, text, va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.15 * max(ends))
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    page = options.page.read_text()
    made = render(page, options.results)
    if options.check:
        sys.exit(f"{options.page} is out of date; run tools/bench/report" if made != page else 0)
    options.page.write_text(made)
    if merged := load(options.results / MERGED):
        draw(merged, options.picture)


if __name__ == "__main__":
    main()
