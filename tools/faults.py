"""Lets system calls fail one by one while merges run, and judges what is left: `docs/results/faults.json`.

For each command and each call that it makes, the N-th call of a thread fails, or the process is killed there; once, and
in all calls from the N-th on; then the command is run again without faults. Right is: an exit code that says what
happened, with a sentence and no traceback; never a wrong byte under a final name; exit 0 for a complete output alone;
and a second run that makes the bytes of an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from tools.fault_calls import CALLS_ONCE_ONLY, ERRORS, KILL, ONCE_ONLY, Fault
from tools.fault_commands import NAMES, Command, commands, write_inputs, write_old
from tools.fault_judge import Tree, tree
from tools.fault_runs import Place, Row, attempt, calls_of, fresh, run, undisturbed, warm_up

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "results" / "faults.json"
LIMIT = 5000
LOOKING = ("ioctl", "lseek", "fadvise64")
_CORES = os.sched_getaffinity(0)


def kinds(call: str) -> list[tuple[str, bool]]:
    """Errors of a call, once and from then on."""
    once = [(error, False) for error in ERRORS[call]]
    if call in CALLS_ONCE_ONLY:
        return once
    return once + [(error, True) for error in ERRORS[call] if error not in (KILL, *ONCE_ONLY)]


def spread(command: str, call: str, calls: int, most: int) -> Iterator[Fault]:
    """Faults of one call: every kind at every place, or `most`, at places from the first to the last, kinds in turn."""
    errors = kinds(call)
    if len(errors) * calls <= most:
        for error, onward in errors:
            for at in range(1, calls + 1):
                yield Fault(command, call, error, at, onward)
        return
    for place in range(most):
        error, onward = errors[place % len(errors)]
        yield Fault(command, call, error, 1 + place * (calls - 1) // max(1, most - 1), onward)


def can_fail(command: str, call: str) -> bool:
    """Whether a call is one that the system may refuse: ioctl of a push is of sockets, where it cannot."""
    return (command, call) != ("push", "ioctl")


def is_real(fault: Fault) -> bool:
    return can_fail(fault.command, fault.call) and fault.error in ERRORS[fault.call]


def planned(counts: Mapping[str, Mapping[str, int]], limit: int) -> tuple[list[Fault], int]:
    """Faults for commands that make so many calls, about `limit` in all; and how many a call has at most.

    Calls that only look get a quarter of that.
    """

    def all_with(most: int) -> list[Fault]:
        return [
            fault
            for command, made in counts.items()
            for call, calls in made.items()
            if can_fail(command, call)
            for fault in spread(command, call, calls, max(1, most // 4) if call in LOOKING else most)
        ]

    most = bisect_right(range(1, limit + 1), limit, key=lambda most: len(all_with(most)))
    return all_with(max(1, most)), max(1, most)


def make_commands(names: Sequence[str], place: Place) -> dict[str, Command]:
    """Commands that know what they make, on new inputs; each was run in this process once."""
    write_inputs(place.inputs)
    write_old(place.inputs / "old")
    made = commands(place.inputs)
    first = made[NAMES[0]]
    warm_up(first, place)
    stop(first, place)
    undisturbed(first, place)
    place.out.rename(place.inputs / "model")
    known = {}
    for name in names:
        warm_up(made[name], place)
        known[name] = made[name].completed(undisturbed(made[name], place))
    return known


def stop(command: Command, place: Place) -> None:
    """Leave a run that was killed half way among the inputs, for others to go on with."""
    for at in range(9, 0, -1):
        with fresh(command, place) as hub:
            ended = run(command, place, hub, Fault(command.name, "fdatasync", KILL, at))
        if ended.code == -9 and not (place.out / "config.json").exists():
            place.out.rename(place.inputs / "stopped")
            return
    sys.exit("no run could be stopped half way")


def sweep(
    known: Mapping[str, Command], faults: Sequence[Fault], place: Place, jobs: int
) -> Iterator[tuple[Fault, Row]]:
    """A row for each fault, in no order, `jobs` side by side."""
    inputs = tree(place.inputs)
    turns: Any = multiprocessing.get_context("fork").Queue()
    for number in range(jobs):
        turns.put(number)
    with multiprocessing.get_context("fork").Pool(jobs, _begin, (known, place, inputs, turns)) as workers:
        yield from workers.imap_unordered(_attempt, faults)


@dataclass
class Worker:
    """What a process of the pool knows from its beginning."""

    known: Mapping[str, Command]
    place: Place
    inputs: Tree


_WORKER: list[Worker] = []


def _begin(known: Mapping[str, Command], place: Place, inputs: Tree, turns: Any) -> None:
    number = turns.get()
    os.sched_setaffinity(0, {sorted(_CORES)[number % len(_CORES)]})
    _WORKER.append(Worker(known, replace(place, folder=place.folder.with_name(f"run-{number}")), inputs))


def _attempt(fault: Fault) -> tuple[Fault, Row]:
    (worker,) = _WORKER
    return fault, attempt(worker.known[fault.command], fault, worker.place, worker.inputs)


def results(
    rows: Sequence[tuple[Fault, Row]], counts: Mapping[str, Mapping[str, int]], most: int, seconds: float
) -> dict[str, Any]:
    """Contents of docs/results/faults.json."""
    hit = [(fault, row) for fault, row in rows if row.hit]
    bad = [row for _, row in sorted(rows, key=lambda each: str(each[0])) if row.problems]
    return {
        "made_by": "tools/faults",
        "machine": machine(),
        "seconds": round(seconds),
        "faults": len(hit),
        "not reached": len(rows) - len(hit),
        "most faults of a call": most,
        "commands": {name: dict(sorted(made.items())) for name, made in counts.items()},
        "outcomes": outcomes(row for _, row in hit),
        "table": table(hit),
        "accepted": dict(Counter(row.accepted for _, row in hit if row.accepted)),
        "bad": [asdict(row) for row in bad],
    }


def table(hit: Sequence[tuple[Fault, Row]]) -> list[dict[str, Any]]:
    """Call x fault: how many of each command, and with which exits they ended."""
    kinds: dict[tuple[str, str, str], list[tuple[Fault, Row]]] = {}
    for fault, row in hit:
        kinds.setdefault((fault.call, fault.error, "from" if fault.onward else "once"), []).append(
            (fault, row)
        )
    return [
        {
            "call": call,
            "error": error,
            "when": when,
            "points": dict(sorted(Counter(fault.command for fault, _ in found).items())),
            "outcomes": outcomes(row for _, row in found),
            "bad": sum(bool(row.problems) for _, row in found),
        }
        for (call, error, when), found in sorted(kinds.items())
    ]


def outcomes(rows: Iterable[Row]) -> dict[str, int]:
    """How many ended with each exit code; "killed", and "hang"."""
    return dict(sorted(Counter(_end(row.code) for row in rows).items()))


def _end(code: int | None) -> str:
    return {None: "hang", -9: "killed"}.get(code, str(code))


def mended(before: Mapping[str, Any], rows: Sequence[tuple[Fault, Row]]) -> dict[str, Any]:
    """Earlier results with what was bad in them as it ends now: `rows` are of those faults that are still injected.

    Others, of calls that cannot fail so, are left out.
    """
    found = json.loads(json.dumps(before))
    by_kind = {(row["call"], row["error"], row["when"]): row for row in found["table"]}

    def count(fault: Fault, ends: str, is_bad: bool, number: int) -> None:
        kind = by_kind[fault.call, fault.error, "from" if fault.onward else "once"]
        for counts, key in (
            (kind["points"], fault.command),
            (kind["outcomes"], ends),
            (found["outcomes"], ends),
        ):
            counts[key] = counts.get(key, 0) + number
        kind["bad"] += number * is_bad
        found["faults"] += number

    for row in before["bad"]:
        count(Fault.parse(row["fault"]), _end(row["code"]), is_bad=True, number=-1)
    for fault, row in rows:
        if row.hit:
            count(fault, _end(row.code), bool(row.problems), number=1)
    found["bad"] = [asdict(row) for _, row in rows if row.problems]
    found["table"] = [_counted(row) for row in found["table"] if sum(row["points"].values())]
    return _counted(found)


def _counted(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the counts that have become 0."""
    for key in ("points", "outcomes"):
        if key in row:
            row[key] = {name: count for name, count in sorted(row[key].items()) if count}
    return row


def machine() -> dict[str, Any]:
    strace = subprocess.run(["strace", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "cores": len(_CORES),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "strace": strace.split()[3],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(found: Mapping[str, Any], target: Path) -> None:
    """As JSON, one line for each kind of fault."""
    lines = ",\n  ".join(json.dumps(row) for row in found["table"])
    head, tail = json.dumps({**found, "table": ["HERE"]}, indent=1).split('"HERE"')
    target.write_text(f"{head.rstrip()}\n  {lines}\n {tail.lstrip()}\n")


def main() -> int:
    given = parse()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(_CORES)})
    tqdm.monitor_interval = 0
    began = time.monotonic()
    target = given.out or TARGET
    before = json.loads(target.read_text()) if given.again else None
    only = [
        Fault.parse(text) for text in given.only or [row["fault"] for row in (before or {"bad": []})["bad"]]
    ]
    only = [fault for fault in only if given.only or is_real(fault)]
    if before and not only:
        write(mended(before, []), target)
        return 0
    names = [name for name in NAMES if name in ({fault.command for fault in only} or given.commands)]
    with tempfile.TemporaryDirectory(prefix="faults-", dir=given.folder) as scratch:
        place = Place(Path(scratch, "run"), Path(scratch, "inputs"))
        known = make_commands(names, place)
        counts = {name: calls_of(command, place) for name, command in known.items()}
        faults, most = planned(counts, given.limit)
        faults = only or chosen(faults, given.calls, given.sample, given.seed)
        tell(f"{len(faults)} faults in {len(known)} commands; up to {most} of a call", began)
        rows = []
        for fault, row in sweep(known, faults, place, given.jobs):
            rows.append((fault, replace(row, text=row.text.replace(scratch, ""))))
            show(row, bool(only), scratch)
            if len(rows) % 100 == 0:
                bad = sum(bool(row.problems) for _, row in rows)
                tell(f"{len(rows)} of {len(faults)}, {bad} bad", began)
    found = mended(before, rows) if before else results(rows, counts, most, time.monotonic() - began)
    found = json.loads(json.dumps(found).replace(scratch, "").replace(f"{ROOT}/", ""))
    tell(f"{found['faults']} faults: {found['outcomes']}, {len(found['bad'])} bad", began)
    is_whole = not (only or given.calls or given.sample) and list(given.commands) == list(NAMES)
    if given.out or is_whole or before:
        write(found, target)
    return int(bool(found["bad"]))


def chosen(faults: Sequence[Fault], calls: Sequence[str], sample: int | None, seed: int) -> list[Fault]:
    """Those of some calls, or a random part of them; else all, mixed so that an early look sees every kind."""
    mixed = [fault for fault in faults if not calls or fault.call in calls]
    random.Random(seed).shuffle(mixed)
    return mixed[:sample]


def show(row: Row, whole: bool, scratch: str) -> None:
    if row.problems or whole:
        text = "\n".join((f"{row.fault}: exit {row.code}: {'; '.join(row.problems) or 'right'}", *row.hits))
        print(text.replace(scratch, ""), flush=True)
    if whole:
        print(row.text, row.text_again, sep="\n")


def tell(what: str, began: float) -> None:
    print(f"[{time.monotonic() - began:4.0f} s] {what}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FAULT",
        help="such as 'bf16 pwrite64 EIO 17', or '17+'",
    )
    parser.add_argument(
        "--again", action="store_true", help="what the results call bad, with a new end in them"
    )
    parser.add_argument("--commands", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--calls", nargs="+", default=[], metavar="CALL", help="only these calls")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help="faults in all: kinds of many calls get fewer"
    )
    parser.add_argument("--sample", type=int, help="of these, so many at random")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of --sample")
    parser.add_argument("--jobs", type=int, default=len(_CORES))
    parser.add_argument("--folder", type=Path, help="where runs write (default: a scratch folder)")
    parser.add_argument(
        "--out", type=Path, help=f"write results here (default: {TARGET.relative_to(ROOT)}, if all are tried)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
