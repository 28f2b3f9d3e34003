"""Every format and rounding on a GPU made of Python, beside the CPU: bytes, waits, launches, memory.

What is compared, and what the device sees and does not, is told in `tests/pretend`. `before` in the result are the
short set's numbers of an earlier tree, which stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs/results/pretend-gpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/pretend_gpu", description=__doc__)
    parser.add_argument("--before", type=Path, help="take the numbers of an earlier tree from this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kinds.json"
        subprocess.run([sys.executable, "-m", "tests.pretend.kinds", str(made), "--all"], check=True)
        kinds = json.loads(made.read_text())
    recorded: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if given.before is not None:
        recorded["before"] = json.loads(given.before.read_text())
    RESULT.write_text(
        json.dumps({**recorded, "made_by": "tools/pretend_gpu", "kinds": kinds}, indent=1) + "\n"
    )
    wrong = [each["name"] for each in kinds if not each["same"]]
    print(f"{len(kinds)} kinds, {len(wrong)} not as on a CPU", *wrong, sep="\n  ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
