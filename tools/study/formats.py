"""A real adapter merged into every base format and written to every format, beside the owners' libraries.

T is the 16-bit base with the adapter beside it, run by PEFT in float32. *Written*: the 16-bit base is merged and
written to each format, by nearest rounding, by what streamconv chooses itself (auto), and by feedback with text.
*Kept*: the base is first converted to the format, without the adapter; the merge then begins from that file, to
bfloat16 and to the base's own format. Beside each stands what the format's owner makes by nearest rounding of the same
values and the same update, added in float32 by torch. Stock transformers judges the values that files decode to.

What is done is kept in docs/results/study-formats.json after every cell, and not done again; `--anew PATTERN` forgets
cells. A cell is named BED/written/FORMAT/WAY or BED/kept/FORMAT/WAY.
"""

from __future__ import annotations

import argparse
import fcntl
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamconv.errors import InputError, OptionError, VerificationError
from streamconv.formats import FORMATS
from streamconv.formats.gguf import PREFIX
from tools.bench.results import RESULTS, load, machine, save
from tools.format_page import format_rows
from tools.make_demo_base import make_demo_base
from tools.perplexity import be_quiet, read_windows
from tools.study.beds import BEDS, DEMO_BASE, Bed, described, rounded
from tools.study.format_files import (
    Made,
    OwnerError,
    Values,
    calibration,
    converted,
    dense_base,
    digest,
    give_awq_its_owners_grid,
    group_options,
    is_quantized,
    kept_of,
    measures_inputs,
    merged,
    opened,
    owner_of,
    requantized,
    squared_error,
    with_update,
)
from tools.study.format_judge import Answers, Judge, verdict

MADE_BY = "tools/study/formats"
RESULT = RESULTS / "study-formats.json"
WORK = Path(".study") / "formats"
# Fewer tokens than other studies judge by: differences are of the same text, and there are hundreds of files.
STUDIED: Mapping[str, Bed] = {
    "demo-kjv": replace(
        BEDS["demo-kjv"], windows=16, tokens=64, calibration_tokens=4096, calibration_length=256
    ),
    "faq-kjv-light": replace(
        BEDS["faq-kjv-light"], windows=32, tokens=128, calibration_tokens=4096, calibration_length=256
    ),
}
WRITTEN, KEPT = "written", "kept"
NEAREST, SEARCH, AUTO, FEEDBACK = "nearest", "search", "auto", "feedback"
OWNER, SIXTEEN_BIT = "owner", "bfloat16"
CALIBRATES = {row.name: row.takes_calibration for row in format_rows({})}


@dataclass(frozen=True, slots=True)
class Cell:
    """One file: what it begins from, its format, and who chooses its codes how."""

    bed: str
    table: str
    format: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.bed}/{self.key}"

    @property
    def key(self) -> str:
        """Its name among those of its bed."""
        return f"{self.table}/{self.format}/{self.way}"


def cells(bed: str) -> Iterator[Cell]:
    """All cells of a bed, in the order of the formats."""
    for name in FORMATS:
        for way in (*_roundings(name, WRITTEN), OWNER) if is_quantized(name) else (NEAREST,):
            yield Cell(bed, WRITTEN, name, way)
    for name in filter(is_quantized, FORMATS):
        for way in (SIXTEEN_BIT, *_roundings(name, KEPT), OWNER):
            yield Cell(bed, KEPT, name, way)


def _roundings(name: str, part: str) -> Sequence[str]:
    """Ways of ours. With text, auto is feedback; where that is needed anyway, there is nothing without. A base has what
    was measured on text.

    llama.cpp's quantizer searches for scales: of its types there is our search as well.
    """
    others = () if part == WRITTEN and measures_inputs(name) else (AUTO,)
    searched = (SEARCH,) if name.startswith(PREFIX) else ()
    return (NEAREST, *searched, *others, *((FEEDBACK,) if CALIBRATES[name] else ()))


# -- one bed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """What a merge begins from and is judged by: a base, its values, those of T, and references by name."""

    base: Path
    values: Values
    target: Values
    references: Mapping[str, Answers]


class Study:
    """The open cells of a bed."""

    def __init__(self, bed: Bed, work: Path, known: Mapping[str, Any]) -> None:
        self._bed, self._work = bed, work
        windows = read_windows(bed.base, bed.held_out, bed.windows, bed.tokens)
        self._judge = Judge(bed.base, windows)
        base = dense_base(bed)
        self._T = self._judge.of_parts(bed.base, bed.adapter)
        self._start = Start(bed.base, base, with_update(base, bed), {"T": self._T})
        # Files that hold the same values are judged once, and not again where cells are measured anew.
        self._verdicts = dict(_verdicts(known))

    def fill(self, wanted: Sequence[Cell]) -> None:
        """Make and judge cells, those of one file's format together."""
        for table, begin in ((WRITTEN, lambda _: self._start), (KEPT, self._kept_start)):
            for name in dict.fromkeys(cell.format for cell in wanted if cell.table == table):
                ways = [cell for cell in wanted if (cell.table, cell.format) == (table, name)]
                try:
                    start = begin(name)
                except (OptionError, InputError) as refusal:
                    for cell in ways:
                        _keep(self._bed, cell, {"refused": str(refusal)})
                    continue
                self._of_format(name, ways, start)

    def _kept_start(self, name: str) -> Start:
        """The base in a format, without the adapter, and its own T: the adapter added to what it decodes to."""
        base = self._work / "base"
        options = group_options(name) | self._text(name)
        made = converted(self._bed.base, base, quant=name, rounding=NEAREST, **options)
        if name == "awq":
            give_awq_its_owners_grid(base, self._start.values)
            made = opened(base)
        target = with_update(made.values, self._bed)
        references = {"T": self._T, "own": self._judge.of(target)}
        return Start(base, made.values, target, references)

    def _of_format(self, name: str, ways: Sequence[Cell], start: Start) -> None:
        like: Made | None = None
        for cell in ways:
            began = time.process_time()
            try:
                if cell.way == OWNER:
                    like = like or self._nearest(cell, start)
                    folder = start.base if cell.table == KEPT else self._work / NEAREST
                    made, versions = requantized(name, start.target, like, self._work, folder)
                    more = {"by": owner_of(name).label, "versions": versions}
                else:
                    made, more = self._ours(cell, start), {"by": "streamconv"}
            except (OptionError, InputError, VerificationError) as refusal:
                _keep(self._bed, cell, {"refused": str(refusal)})
                continue
            except OwnerError as failure:
                print(f"{cell.name}: {failure}", flush=True)
                continue
            if cell.way == NEAREST and cell.table == WRITTEN:
                like = made
            row = {**more, **self._described(cell, made, start), "cpu_s": time.process_time() - began}
            _keep(self._bed, cell, row)

    def _nearest(self, cell: Cell, start: Start) -> Made:
        """Which weights the format quantizes: those of the kept base, or of the file written by nearest rounding.

        All others are merged in bfloat16.
        """
        if cell.table == WRITTEN:
            return self._ours(replace(cell, way=NEAREST), start)
        base = opened(start.base)
        others = {
            name: each.bfloat16().float()
            for name, each in start.target.items()
            if name not in base.quantized and not torch.equal(each, base.values[name])
        }
        return replace(base, values={**base.values, **others})

    def _ours(self, cell: Cell, start: Start) -> Made:
        out = self._work / cell.way
        if cell.way == SIXTEEN_BIT:
            return merged(self._bed, start.base, out, quant="none", dtype=SIXTEEN_BIT)
        quant = "keep" if cell.table == KEPT else cell.format
        options: dict[str, Any] = {} if cell.table == KEPT else group_options(cell.format)
        if not is_quantized(cell.format):
            return merged(self._bed, start.base, out, quant=quant)
        options["rounding"] = cell.way
        if cell.way == FEEDBACK:
            options |= calibration(self._bed)
        elif cell.table == WRITTEN:
            options |= self._text(cell.format)
        return merged(self._bed, start.base, out, quant=quant, min_kept=0.0, **options)

    def _text(self, name: str) -> dict[str, Any]:
        return calibration(self._bed) if measures_inputs(name) else {}

    def _described(self, cell: Cell, made: Made, start: Start) -> dict[str, Any]:
        said = digest(made.values)
        key = f"{cell.table}/{cell.format}/{said}"
        if key not in self._verdicts:
            self._verdicts[key] = verdict(self._judge, self._judge.of(made.values), start.references)
        return {
            "bits": made.bits,
            "rounding": made.rounding,
            "kept": kept_of(made.values, start.values, self._bed),
            "reported_kept": made.kept_delta,
            "squared_error": squared_error(made.values, start.target, made.quantized)
            if made.quantized
            else 0.0,
            "values": said,
            **self._verdicts[key],
        }


# -- results -------------------------------------------------------------------------------------------------


def _keep(bed: Bed, cell: Cell, row: Mapping[str, Any]) -> None:
    order = {each.key: place for place, each in enumerate(cells(bed.name))}
    made_on = machine(WORK)
    with _alone():
        beds = load(RESULT).get("beds", {})
        found = beds.get(bed.name, {"cells": {}})["cells"] | {cell.key: rounded(dict(row))}
        ordered = dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
        beds |= {bed.name: {"bed": described(bed), "cells": ordered}}
        in_order = {name: beds[name] for name in STUDIED if name in beds}
        save(RESULT, MADE_BY, {"machine": made_on, "beds": in_order})
    said = (
        row["refused"] if "refused" in row else f"{1000 * sum(row['kl_T']) / len(row['kl_T']):.2f}/1000 nat"
    )
    print(f"{cell.name}: {said}", flush=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Beds may be measured by several processes at once, which keep what they find in one file."""
    with (WORK / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measured(bed: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = load(RESULT).get("beds", {}).get(bed, {"cells": {}})["cells"]
    return found


def _verdicts(cells: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was found of files, by table, format and digest of their values."""
    for name, row in cells.items():
        if "values" in row:
            found = {
                key: each for key, each in row.items() if key.startswith(("losses", "kl_", "agreement_"))
            }
            yield f"{name.rpartition('/')[0]}/{row['values']}", found


def _forget(pattern: str) -> None:
    if kept := load(RESULT):
        for bed, found in kept["beds"].items():
            found["cells"] = {
                name: row for name, row in found["cells"].items() if not re.search(pattern, f"{bed}/{name}")
            }
        save(RESULT, MADE_BY, kept)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=__doc__)
    parser.add_argument("beds", nargs="*", help=f"{', '.join(STUDIED)}; all, unless some are named")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cells whose names match a regex")
    parser.add_argument("--but", default="$^", metavar="PATTERN", help="not those whose names match")
    parser.add_argument("--anew", metavar="PATTERN", help="measure cells again whose names match")
    options = parser.parse_args(arguments)
    if unknown := set(options.beds) - set(STUDIED):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(STUDIED)}")
    be_quiet()
    WORK.mkdir(parents=True, exist_ok=True)
    known = {name: measured(name) for name in STUDIED}
    if options.anew:
        _forget(options.anew)
    for bed in (STUDIED[name] for name in options.beds or STUDIED):
        if bed.base == DEMO_BASE:
            make_demo_base(DEMO_BASE)
        done = measured(bed.name)
        wanted = [
            cell
            for cell in cells(bed.name)
            if cell.key not in done
            and re.search(options.only, cell.name)
            and not re.search(options.but, cell.name)
        ]
        if wanted:
            with tempfile.TemporaryDirectory(dir=WORK) as work:
                Study(bed, Path(work), known[bed.name]).fill(wanted)


if __name__ == "__main__":
    main()
