"""Sweep of faults of the Hub: every kind at every request, once and for ever, or a drawn number of them.

Writes docs/results/hub-faults.json: for each fault its cases, exits, and what was wrong, which must be nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.hub_faults import FAULTS, Case, Found, world

RESULT = Path(__file__).parents[1] / "docs" / "results" / "hub-faults.json"
_WRITTEN_EVERY = 20


def cases(requests: int, count: int | None, seed: int) -> list[Case]:
    """All cases of a run of so many requests, or `count` of them, drawn."""
    every = [
        Case(fault, at, forever)
        for fault in FAULTS
        for at in range(1, requests + 1)
        for forever in (False, True)
    ]
    return every if count is None or count >= len(every) else random.Random(seed).sample(every, count)


def summary(requests: int, seed: int, found: Sequence[Found], seconds: float) -> dict[str, object]:
    """The sweep in figures; every case that went wrong, whole."""
    kinds = {
        fault: {
            "cases": len(own),
            "exits": {str(code): count for code, count in sorted(Counter(each.code for each in own).items())},
            "wrong": sum(bool(each.wrong) for each in own),
            "slowest_s": round(max(each.seconds for each in own), 2),
        }
        for fault in FAULTS
        if (own := [each for each in found if each.case.fault == fault])
    }
    return {
        "made_by": "tools/hub_faults",
        "requests": requests,
        "seed": seed,
        "cases": len(found),
        "seconds": round(seconds),
        "exits": {str(code): count for code, count in sorted(Counter(each.code for each in found).items())},
        "wrong": [
            {
                "case": str(each.case),
                "at": each.struck,
                "exit": each.code,
                "wrong": each.wrong,
                "said": each.sentence,
            }
            for each in found
            if each.wrong
        ],
        "faults": kinds,
    }


def write(told: Mapping[str, object]) -> None:
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    """Try cases and write what came of them, now and then while it goes on; exit 1 if one went wrong."""
    parser = argparse.ArgumentParser(prog="tools/hub_faults", description=__doc__)
    parser.add_argument("--cases", type=int, help="so many of them, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    seed = options.seed
    began = time.monotonic()
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder, world(Path(folder)) as given:
        requests = len(given.requests)
        for case in cases(requests, options.cases, seed):
            found.append(given.try_case(case))
            if found[-1].wrong:
                print(found[-1].case, found[-1].struck, found[-1].wrong, found[-1].sentence, flush=True)
            if not len(found) % _WRITTEN_EVERY:
                write(summary(requests, seed, found, time.monotonic() - began))
    write(summary(requests, seed, found, time.monotonic() - began))
    wrong = sum(bool(each.wrong) for each in found)
    print(f"{len(found)} cases, {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
