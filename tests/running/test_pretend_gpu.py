"""The package on a GPU made of Python: the CPU's bytes, no wait in a tile's submission, memory within the plan.

The device is `tests/pretend`, in a process of its own; `tools/pretend_gpu` runs every format and rounding on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamconv.planning.memory import FIXED_VRAM_BYTES
from tools.pretend_gpu import BLOCK, PAGE, RESULT, render

ROOT = Path(__file__).parents[2]
Found = Mapping[str, Any]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    result = tmp_path_factory.mktemp("pretend") / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "tests.pretend.kinds", str(result)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = json.loads(result.read_text())
    return found


@pytest.fixture(scope="module")
def found(result: Mapping[str, Any]) -> Mapping[str, Found]:
    return {each["name"]: each for each in result["kinds"]}


def check_like_a_cpu(found: Mapping[str, Found]) -> None:
    for name, each in found.items():
        assert each["same"], (name, each["error"])
        assert each["kept"][0] == each["kept"][1], name


def check_as_cuda_has_it(found: Mapping[str, Found]) -> None:
    for name, each in found.items():
        assert not each["unknown"], name  # operations on types that CUDA has no kernel for
        if not name.startswith(("calibrated", "analyzed")):  # means, of which no bits are promised
            assert not each["reciprocals"], name  # divisions that CUDA rounds twice
        assert not each["crossed"], name  # memory of one stream, freed after use on another


def check_that_nothing_waits(found: Mapping[str, Found]) -> None:
    for name, each in found.items():
        assert not each["waits_submitted"], name


def test_everything_is_as_on_a_cpu(found: Mapping[str, Found]) -> None:
    assert len(found) > 30
    check_like_a_cpu(found)
    check_as_cuda_has_it(found)


def test_no_tile_is_waited_for_while_it_is_submitted(found: Mapping[str, Found]) -> None:
    check_that_nothing_waits(found)


def check_memory(found: Mapping[str, Found]) -> None:
    for name, each in found.items():
        assert each["peak"] <= each["planned"] or not each["planned"], name
        if "full cells" in name:
            fixed = (
                0 if "calibrated" in name else FIXED_VRAM_BYTES
            )  # for libraries; no part of what is counted
            counted = each["planned"] - fixed
            assert 0.8 * counted <= each["peak"] <= counted, name


def test_memory_is_within_the_plan_and_little_below_it_where_cells_are_full(
    found: Mapping[str, Found],
) -> None:
    check_memory(found)


def test_the_device_sees_what_it_is_for(result: Mapping[str, Any]) -> None:
    """It refuses tensors of two devices, and knows waits, divisions by numbers, memory, and missing kernels."""
    assert result["faults"] == {
        "mix refused": True,
        "waits of item, mask, number set, pageable copy": [1, 1, 1, 1],
        "pinned copies wait": 0,
        "divisions by 3, by 4": [1, 0],
        "bytes of 1000 floats": 4096,
        "bytes after": 0,
        "freed after use on another stream, waited for and not": [0, 1],
        "no kernel": [["bitwise_and", "torch.float32"]],
    }


def test_the_guide_says_what_was_counted() -> None:
    page = PAGE.read_text()
    assert BLOCK.search(page)
    assert render(page, json.loads(RESULT.read_text())) == page


def test_what_was_shown_for_all_kinds() -> None:
    recorded = json.loads(RESULT.read_text())
    all_of_them = {each["name"]: each for each in recorded["kinds"]}
    assert len(all_of_them) > 100
    # A residual adapter is made of sums in float32, of which no bits are promised; what comes after sees it.
    differing = {name for name, each in all_of_them.items() if not each["same"]}
    assert all(", residual" in name and not all_of_them[name]["error"] for name in differing)
    check_like_a_cpu({name: each for name, each in all_of_them.items() if name not in differing})
    check_as_cuda_has_it(all_of_them)
    check_that_nothing_waits(all_of_them)
    check_memory(all_of_them)
