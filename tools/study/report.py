"""docs/why-merging-loses-quality.md from what was measured: numbers, tables and pictures come from docs/results.

A block of the page stands between `<!-- NAME: made by tools/study/report -->` and `<!-- end -->`; the words around
blocks are written by hand and hold no measured number. `--check` writes nothing and ends with 1 if a block is not
what the results say; `--bars` prints what has been shown and what has not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.bench.results import RESULTS, ROOT, load
from tools.study.bars import Results, bars
from tools.study.beds import BEDS
from tools.study.pictures import PICTURES
from tools.study.tables import BLOCKS

PAGE = ROOT / "docs/why-merging-loses-quality.md"
_BLOCK = re.compile(r"(<!-- (\w+): made by tools/study/report -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(folder: Path) -> tuple[Mapping[str, Results], Results]:
    """Results of the beds by name, and of synthetic layers with those by size; empty where nothing was measured."""
    beds = {name: load(folder / f"study-{name}.json") for name in BEDS}
    synthetic = load(folder / "study-synthetic.json")
    return beds, synthetic and {**synthetic, "sizes": load(folder / "study-sizes.json").get("sizes", {})}


def render(page: str, folder: Path) -> str:
    """The page with its blocks made anew from the results in `folder`."""
    beds, synthetic = read(folder)
    return _BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]](beds, synthetic)}\n\n{match[4]}", page)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/study/report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--bars", action="store_true", help="only print the checks")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    beds, synthetic = read(options.results)
    if options.bars:
        for bar in bars(beds, synthetic):
            print({True: "pass", False: "FAIL", None: "    "}[bar.passes], f"{bar.claim}: {bar.found}")
        return
    page = options.page.read_text()
    made = render(page, options.results)
    if options.check:
        sys.exit(f"{options.page} is out of date; run tools/study/report" if made != page else 0)
    options.page.write_text(made)
    for name, draw in PICTURES.items():
        draw(beds, synthetic, options.page.with_name(name))


if __name__ == "__main__":
    main()
