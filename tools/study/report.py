"""Pages of docs: what is measured there comes from docs/results.

A block of a page stands between `<!-- NAME: made by tools/study/report -->` and `<!-- end -->`; the words around
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
from tools.study import parameters, rescalings
from tools.study.bars import Results, bars
from tools.study.beds import BEDS
from tools.study.beside_gptqmodel import RESULT
from tools.study.comparisons import AMOUNTS, results_path
from tools.study.pictures import PICTURES
from tools.study.tables import BLOCKS

PAGE = ROOT / "docs/why-merging-loses-quality.md"
GUIDE = ROOT / "docs/guide-residual.md"
RESULTS_PAGE = ROOT / "docs/results.md"
AWQ_GUIDE = ROOT / "docs/guide-awq.md"
PAGES = (PAGE, GUIDE, AWQ_GUIDE, RESULTS_PAGE)
_BLOCK = re.compile(r"(<!-- (\w+): made by tools/study/report -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(folder: Path) -> tuple[Mapping[str, Results], Results]:
    """Results of the beds by name; and of all else, empty where nothing was measured.

    That is: `synthetic` layers, the update by `sizes`, files beside those of `gptqmodel`, AWQ files in `rescalings`,
    feedback with other `parameters`, and by bed what `streamconv compare` found, `compared`.
    """
    beds = {name: load(folder / f"study-{name}.json") for name in BEDS}
    others = {
        "synthetic": load(folder / "study-synthetic.json"),
        "sizes": load(folder / "study-sizes.json").get("sizes", {}),
        "gptqmodel": load(folder / RESULT.name),
        "rescalings": load(folder / rescalings.RESULT.name),
        "parameters": load(folder / parameters.RESULT.name),
        "compared": {name: load(folder / results_path(name).name) for name in AMOUNTS},
    }
    return beds, others


def render(page: str, folder: Path) -> str:
    """The page with its blocks made anew from the results in `folder`."""
    beds, others = read(folder)
    return _BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]](beds, others)}\n\n{match[4]}", page)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/study/report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--bars", action="store_true", help="only print the checks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    beds, others = read(options.results)
    if options.bars:
        for bar in bars(beds, others):
            print({True: "pass", False: "FAIL", None: "    "}[bar.passes], f"{bar.claim}: {bar.found}")
        return
    for page in PAGES:
        before = page.read_text()
        made = render(before, options.results)
        if not options.check:
            page.write_text(made)
        elif made != before:
            sys.exit(f"{page} is out of date; run tools/study/report")
    for name, draw in () if options.check else PICTURES.items():
        draw(beds, others, PAGE.with_name(name))


if __name__ == "__main__":
    main()
