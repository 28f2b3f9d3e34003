"""Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from streamconv.output.manifest import Report
from streamconv.pipeline import run as run_job
from streamconv.progress import OnProgress, StopRequest
from tests.cli.calls import Inputs, run, succeed


def test_signals_mean_again_what_they_meant_before(inputs: Inputs, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    succeed("convert", "--base", inputs.base, "-o", tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stop_is_no_error(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal at the first sign of progress; then the same command goes on."""

    def stopped(prepared: Any, out: Path, on_progress: OnProgress, stop: StopRequest) -> Report:
        def told(done: int, total: int) -> None:
            on_progress(done, total)
            os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as once:
            once.setattr(os, "_exit", lambda code: None)
            return run_job(prepared, out, told, stop)

    command = ["convert", "--base", str(inputs.base), "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr("streamconv.pipeline.run", stopped)
        result = run(*command)
    assert result.exit_code == 143
    assert result.stderr.endswith("stopped by a signal; run the same command again to go on\n")
    assert "Error" not in result.stderr
    assert set(os.listdir(tmp_path / "out")) == {".streamconv"}
    succeed(*command)
    assert ".streamconv" not in os.listdir(tmp_path / "out")
