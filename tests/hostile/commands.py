"""The command line for tests that kill it: each run a fork of one warmed-up process, so that runs take no second.

A test says at which call that changes the disk a signal shall come. Threads take turns as they like while shards are
written, so a number is somewhere there; of what comes in a fixed order, a test names the first call to be counted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL_MODULES = (
    "streamconv.calibration.layers",
    "streamconv.calibration.need",
    "streamconv.calibration.equalizing",
    "streamconv.forward.linears",
    "streamconv.evaluation.scoring",
    "streamconv.comparison.running",
    "torch._dynamo",
    "tests.hostile.conversions",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
)
"""Imports of a fork server whose commands run models."""


@dataclass(frozen=True, slots=True)
class Request:
    """One run.

    `signal` is raised before the call number `at`, the first one or the first named `since` (as in Outcome.calls)
    being number 1, or if that one writes and `tears` is set, after half of it; with `again`, before the next call too.
    With a `fault`, such as "EIO", "short" (half of it is done) or "end" (nothing is read), the call fails instead, and
    with `onward` all after it; `of` are functions, such as "preadv", whose calls alone are counted then.
    `kill_after_s` kills by the clock instead. `slow_s` is how long each write of a shard takes. `goes_on` is the
    process id of a stopped run that shall continue, all else ignored. `streams` are what descriptors 0, 1 and 2 are
    instead of a file: `closed`, `full`, or `gone`, a pipe that nobody reads. `ignored` signals come to nothing.
    """

    arguments: tuple[str, ...] = ()
    at: int | None = None
    since: str | None = None
    signal: int = signal.SIGKILL
    tears: bool = False
    again: bool = False
    fault: str = ""
    of: tuple[str, ...] = ()
    onward: bool = False
    kill_after_s: float | None = None
    slow_s: float = 0.0
    watermark_bytes: int = 2**28
    grace_s: float = 5.0
    goes_on: int | None = None
    streams: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`code` is the exit code, or minus the signal that ended or stopped the process.

    Unless it ended at once: `calls` are those that change the disk, such as `replace config.json`, and `starts` tell
    of each shard that was worked on the length of its header and the offset from which it was made; its format stands
    before its name if there were several outputs; `hits` are the calls that failed. `cpu_seconds` are those of the run
    alone, and `grown_bytes` what its memory had at most beyond that of the process it was forked from.
    """

    code: int
    text: str
    seconds: float
    process: int
    cpu_seconds: float
    grown_bytes: int
    calls: tuple[str, ...]
    starts: dict[str, tuple[int, int]]
    hits: tuple[str, ...] = ()

    @property
    def resumed_inside(self) -> bool:
        """Whether some shard was continued from its middle."""
        return any(start > header for header, start in self.starts.values())


class Commands:
    """A running fork server."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server, self._folder = server, folder

    def run(self, *arguments: str | Path, **settings: Any) -> Outcome:
        """`streamconv` with these arguments; `settings` are the other fields of Request."""
        return self.ask(Request(tuple(map(str, arguments)), **settings))

    def ask(self, request: Request) -> Outcome:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(request)) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        starts = {name: (header, start) for name, (header, start) in answer.pop("starts").items()}
        text = (self._folder / f"{answer['process']}.text").read_text()
        return Outcome(
            text=text,
            calls=tuple(answer.pop("calls")),
            hits=tuple(answer.pop("hits")),
            starts=starts,
            **answer,
        )


@contextmanager
def fork_server(*modules: str) -> Iterator[Commands]:
    """`modules` are imported before the first fork, beside what the command line always needs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.hostile.fork_server", folder, *modules]
        # Kernels that are compiled write to numba's cache, which would be counted as calls of the run's own. Threads
        # that wait for each other's share of a tiny product must not spin: tests run side by side.
        environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            yield Commands(server, Path(folder))
            assert server.stdin is not None
            server.stdin.close()
            assert server.wait(timeout=30) == 0
