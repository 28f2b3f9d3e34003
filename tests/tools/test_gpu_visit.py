"""The script for a card that is lent for ten minutes, tried on the CPU: all of its code but CUDA's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import gpu_visit
from tools.bench.gpu_visit import PARTS, WHOLE_S, Part, Visit, apart, main, visit_all

# They take seconds of processor time; `tools/bench/gpu_visit --dry` does them.
SLOW = ("calibrated twice", "compared")


def test_a_trial_does_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {name: part for name, part in PARTS.items() if name not in SLOW}
    monkeypatch.setattr(gpu_visit, "PARTS", quick)
    main(["--dry", "--folder", str(tmp_path / "folder"), "--results", str(tmp_path / "results.json")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["dry"]
    assert found["parts"].keys() == quick.keys()
    assert found["parts"]["old architecture"]["auto"] == "cpu"
    assert "compute capability 6.1" in found["parts"]["old architecture"]["refused"]
    assert found["parts"]["same bytes"]["nf4 nearest"] is True
    assert found["parts"]["70B layers"]["nf4-dq auto from original"]["seconds"] > 0
    assert not (tmp_path / "folder").exists()


def test_all_limits_together_are_below_ten_minutes() -> None:
    assert sum(part.limit_s for part in PARTS.values()) <= 600
    assert WHOLE_S < 600


def test_what_is_cut_short_leaves_a_result_of_all_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.json"

    def interrupt(visit: Visit) -> dict[str, int]:
        raise KeyboardInterrupt

    parts = {"first": Part(lambda visit: {"number": 7}, 1), "second": Part(interrupt, 1)}
    monkeypatch.setattr(gpu_visit, "PARTS", parts)
    with pytest.raises(KeyboardInterrupt):
        visit_all(Visit(tmp_path, "cpu", True), results, lambda name, visit, limit: parts[name].run(visit))
    assert json.loads(results.read_text())["parts"]["first"]["number"] == 7


def test_a_part_that_hangs_or_fails_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = Visit(tmp_path, "cpu", False)
    monkeypatch.setattr(sys, "executable", "false")
    assert apart("links", visit, 5)["failed"] == "exit code 1"
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 9\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert apart("links", visit, 0.1)["failed"] == "not done after 0 s"


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main(["--folder", str(tmp_path / "folder")])
    assert "torch sees no CUDA device" in str(caught.value.code)
