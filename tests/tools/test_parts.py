"""The tool that makes one output by several workers: its record, and the scripts that it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import parts

SCRIPTS = sorted(parts.DEPLOY.glob("*.sh"))


def test_what_is_recorded_was_started_by_real_launchers() -> None:
    found = json.loads(parts.RESULTS.read_text())
    launchers = [each["launcher"] for each in found["launchers"]]
    for named in ("torchrun", "srun -n2", "slurm-srun.sh", "slurm-array.sh, task 1 requeued"):
        assert any(named in each for each in launchers), named
    (array,) = (each for each in found["launchers"] if "array" in each["launcher"])
    assert (array["task_1_ran"], array["task_1_was_stopped"]) == (2, True)
    assert {(each["quant"], each["workers"]) for each in found["walls"]} == {
        (quant, workers) for quant in parts.FORMATS for workers in parts.WORKERS
    }
    many = {(each["quant"], each["workers"]): each for each in found["balance"]}
    assert many["keep", 64]["speed_up_at_most"] > 60
    for each in many.values():  # no part has more than the mean and one file
        assert each["most_bytes"] - each["least_bytes"] <= 5 * 10**9


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_passes_its_arguments_on_and_asks_for_a_part(script: Path, tmp_path: Path) -> None:
    """With programs in place of srun and streamconv that say what they are given."""
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "streamconv").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for name in ("srun", "streamconv"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", script, "--base", "a folder", "-o", "out"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    options = ["--base", "a folder", "-o", "out", "--part", "auto", "--json-progress"]
    assert said.stdout.splitlines() == ["merge", *options]
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=f"{parts.PROGRAM.parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    said = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout
