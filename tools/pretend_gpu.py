"""Every format and rounding on a GPU made of Python, beside the CPU: bytes, waits, launches, memory.

What is compared, and what the device sees and does not, is told in `tests/pretend`. `before` in the result are the
short set's numbers of an earlier tree, which stay; a table of docs/guide-gpu.md has them beside those of this one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs/results/pretend-gpu.json"
PAGE = ROOT / "docs/guide-gpu.md"
BLOCK = re.compile(r"(<!-- pretend: made by tools/pretend_gpu -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(page: str, recorded: Mapping[str, Any]) -> str:
    """The page with its table made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{table(recorded)}\n\n{match[3]}", page)


def table(recorded: Mapping[str, Any]) -> str:
    """What the device was asked for by the merges that were run with an earlier tree as well."""
    now = {each["name"]: each for each in recorded["kinds"]}
    same = sum(each["same"] for each in now.values())
    lines = [
        f"{len(now)} kinds, of which {same} are as on a CPU; the others have a residual adapter, of sums in float32.",
        "",
        "| merge | waits in what was submitted | launches a cell | rounded divisions | planned, used, MiB |",
        "| --- | --: | --: | --: | --: |",
    ]
    for before in recorded["before"]:
        if before["planned"] and before["name"] in now:
            pairs = zip(_numbers(before), _numbers(now[before["name"]]), strict=True)
            lines.append(f"| {before['name']} | " + " | ".join(" to ".join(pair) for pair in pairs) + " |")
    return "\n".join([*lines, "", *_layers(now)])


def _layers(now: Mapping[str, Any]) -> list[str]:
    """Lines of a table with the memory of calibrating a layer at a large model's shapes."""
    wanted = [each for name, each in now.items() if name.startswith("Llama") and each["planned"]]
    rows = [
        f"| {each['name'].removesuffix(', full cells')} | {each['planned'] / 2**30:.2f} | {each['peak'] / 2**30:.2f} |"
        for each in wanted
    ]
    head = ["| calibration of a layer, shapes alone | planned, GiB | used, GiB |", "| --- | --: | --: |"]
    return [*head, *rows]


def _numbers(found: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(sum(found["waits_submitted"].values())),
        f"{found['launches'] / found['cells']:,.0f}",
        str(sum(found["reciprocals"].values())),
        f"{found['planned'] / 2**20:.0f}, {found['peak'] / 2**20:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/pretend_gpu", description=__doc__)
    parser.add_argument("--before", type=Path, help="take the numbers of an earlier tree from this file")
    parser.add_argument("--only", nargs="+", help="run these parts alone; of others the numbers stay")
    given = parser.parse_args()
    parts = ["--only", *given.only] if given.only else []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kinds.json"
        subprocess.run([sys.executable, "-m", "tests.pretend.kinds", str(made), "--all", *parts], check=True)
        kinds = json.loads(made.read_text())["kinds"]
    recorded: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if given.only:
        new = {each["name"]: each for each in kinds}
        kinds = list({**{each["name"]: each for each in recorded["kinds"]}, **new}.values())
    if given.before is not None:
        recorded["before"] = json.loads(given.before.read_text())["kinds"]
    RESULT.write_text(
        json.dumps({**recorded, "made_by": "tools/pretend_gpu", "kinds": kinds}, indent=1) + "\n"
    )
    PAGE.write_text(render(PAGE.read_text(), json.loads(RESULT.read_text())))
    wrong = [each["name"] for each in kinds if not each["same"]]
    print(f"{len(kinds)} kinds, {len(wrong)} not as on a CPU", *wrong, sep="\n  ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
