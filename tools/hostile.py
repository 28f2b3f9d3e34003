"""Writes docs/results/hostile-inputs.json: each row of `hostile_rows` with the exit code and sentence it ended with.

tools/hostile [FILE]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.forward.texts import write_text
from tests.hostile import stranger
from tests.hostile.commands import MODEL_MODULES, ROOT, fork_server
from tests.hostile.hostile_rows import Row, rows, run

TARGET = ROOT / "docs" / "results" / "hostile-inputs.json"


def table(folder: Path) -> list[dict[str, object]]:
    """Rows as they end, in order."""
    inputs = stranger.fill(folder / "inputs")
    write_text(inputs / "text.txt")
    found = []
    with fork_server() as plain, fork_server(*MODEL_MODULES) as models:
        for row in rows():
            place = folder / "row"
            outcome = run(row, inputs, place, {False: plain, True: models})
            last = (outcome.text.strip().splitlines() or [""])[-1] if outcome.code else ""
            found.append(
                {
                    "name": row.name,
                    "made": row.made,
                    "command": _shown(row),
                    "exit": outcome.code,
                    "expected": row.code,
                    "says": last.replace(f"{place}/", ""),
                    "cpu_seconds": round(outcome.cpu_seconds, 2),
                    "memory_mb": round(outcome.grown_bytes / 1e6),
                }
            )
            shutil.rmtree(place)
    return found


def _shown(row: Row) -> str:
    return " ".join(
        ("streamconv", *(each.format(base="base", adapter="adapter", folder=".") for each in row.command))
    )


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    with tempfile.TemporaryDirectory() as folder:
        found = table(Path(folder))
    content = {"made_by": "tools/hostile", "inputs": found}
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    wrong = [row["name"] for row in found if row["exit"] != row["expected"]]
    print(f"{len(found)} inputs, {len(wrong)} ended otherwise than expected: {wrong}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
