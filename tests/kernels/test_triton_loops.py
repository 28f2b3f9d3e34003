"""What Triton's compiler makes of the loops: compiled for cards, of which none is needed, and looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
from tools.triton_code import source_hash

ROOT = Path(__file__).parents[2]


def report(folder: Path, *arguments: str) -> dict[str, Any]:
    """The report of tools/triton_code.py, from a process in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tools.triton_code", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(found: dict[str, Any]) -> None:
    """All operations on floats are rounded by themselves and to the nearest, and none flushes to 0."""
    kinds = {kind for row in found["rows"] for kind in row["floats"]}
    assert kinds <= {f"{each}.rn.f32" for each in ("add", "sub", "mul", "div")} | {"add.rn.f64"}
    assert not any(row["flushes"] for row in found["rows"])
    assert any("fma" in kind for kind in found["if_fused"])  # would be seen, if it were allowed


@pytest.mark.slow
def test_a_search_compiles_to_operations_that_are_rounded_one_by_one(tmp_path: Path) -> None:
    found = report(tmp_path, "--capabilities", "89", "--loops", "search", "--grids", "nf4")
    judge(found)
    assert "div.rn.f32" in found["rows"][0]["floats"]


@pytest.mark.slow
def test_all_loops_compile_for_all_cards_to_operations_that_are_rounded_one_by_one(tmp_path: Path) -> None:
    found = report(tmp_path)
    judge(found)
    assert {row["capability"] for row in found["rows"]} == {80, 86, 89, 90, 100, 120}
    spills = {(row["loop"], row["grid"]) for row in found["rows"] if row["stack"]}
    assert not spills


def test_the_committed_report_holds_no_other_operation() -> None:
    """It is of the loops as they are: who changes one makes it anew, with tools/triton_code.py."""
    found = json.loads((ROOT / "docs/results/triton.json").read_text())
    judge(found)
    assert found["source"] == source_hash()
    assert {row["loop"] for row in found["rows"]} >= {
        "encode_blocks",
        "nearest",
        "stochastic",
        "search",
        "kept",
        "settle_columns",
    }
