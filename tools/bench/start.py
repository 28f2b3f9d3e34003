"""How soon the command line answers: help and mistakes at once, what needs torch after loading it."""

import argparse
import statistics
import sys
from collections.abc import Sequence

from tools.measure import measure

COMMANDS = {
    "streamconv --help": ("--help",),
    "streamconv merge --help": ("merge", "--help"),
    "streamconv merge --qunat nf4": ("merge", "--qunat", "nf4"),
    "streamconv formats": ("formats",),  # loads torch
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/start", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each; the median is shown")
    runs = parser.parse_args(arguments).runs
    print("| command | wall |\n|---|--:|")
    for name, command in COMMANDS.items():
        line = (sys.executable, "-m", "streamconv", *command)
        wall_s = statistics.median(measure(line).wall_s for _ in range(runs))
        print(f"| `{name}` | {wall_s:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
