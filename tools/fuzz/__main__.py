"""Fuzz every kind of file that is read, and write what it came to: python -m tools.fuzz

    tools/fuzz/run                          every target for 60 s, two side by side; result file written
    tools/fuzz/run --only 'config*'         some of them; the result file keeps what it says of others
    tools/fuzz/run --seconds 600 --keep     longer, and inputs that found new branches join the corpus

An input is a defect if it ends in anything but success or a short refusal, takes more than 5 s, or lets the process
grow beyond 1 GiB over what it began with; it is kept in tools/fuzz/found, and `--repeat FILE` tries it again.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from tools.fuzz.targets import TARGETS
from tools.fuzz.trial import LIMIT_S, try_input

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).parent / "corpus"
FOUND = Path(__file__).parent / "found"
RESULT = ROOT / "docs/results/fuzz.json"
RSS_LIMIT_MB = 2000
"""Memory of the process with torch, transformers and atheris, 1 GiB and a little, and 1 GiB more."""

_MAX_LENGTH = 400_000
_KEPT_BYTES = 6_000
_KEPT_FILES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if no target has a defect."""
    given = _parse(arguments)
    names = [name for name in TARGETS if fnmatch.fnmatchcase(name, given.only)]
    if given.repeat:
        return _repeat(names, Path(given.repeat))
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = dict(
            zip(names, pool.map(lambda name: _fuzz(name, given.seconds, given.keep), names), strict=True)
        )
    before = json.loads(RESULT.read_text())["targets"] if RESULT.exists() else {}
    rows = {name: rows.get(name) or before[name] for name in TARGETS if name in rows or name in before}
    RESULT.write_text(json.dumps(summary(rows), indent=1) + "\n")
    return int(any(row["defect"] for row in rows.values()))


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Content of the result file."""
    libraries = {name: version(name) for name in ("atheris", "torch", "numpy")}
    return {
        "made_by": "tools/fuzz/run",
        "versions": {"python": python_version(), **libraries},
        "limits": {"seconds": LIMIT_S, "rss_mb": RSS_LIMIT_MB},
        "executions": sum(row["executions"] for row in rows.values()),
        "defects": sum(bool(row["defect"]) for row in rows.values()),
        "targets": dict(rows),
    }


def _fuzz(name: str, seconds: int, keep: bool) -> dict[str, Any]:
    """Fuzz a target in a process of its own, its corpus first; return its row of the table."""
    FOUND.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        inputs, report = Path(work) / "inputs", Path(work) / "report.json"
        inputs.mkdir()
        for number, seed in enumerate(seeds(name)):
            (inputs / f"seed-{number}").write_bytes(seed)
        flags = [
            *(f"-max_total_time={seconds}", f"-timeout={int(2 * LIMIT_S)}", f"-rss_limit_mb={RSS_LIMIT_MB}"),
            *(f"-max_len={_MAX_LENGTH}", "-print_final_stats=1", f"-artifact_prefix={FOUND}/{name}-"),
        ]
        ended = subprocess.run(
            [sys.executable, "-m", "tools.fuzz.child", name, str(inputs), str(report), *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if keep:
            _keep(name, inputs)
        row = described(
            ended.returncode, ended.stderr, json.loads(report.read_text()) if report.exists() else {}
        )
    told = row["defect"] or "no defect"
    print(f"{name:22} {row['executions']:8} executions, {row['peak_rss_mb']} MB, {told}", flush=True)
    return row


def described(code: int, text: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Row of a target, from what libFuzzer and the trials told."""
    stats = {name: int(number) for name, number in re.findall(r"stat::(\w+):\s+(\d+)", text)}
    defect = None
    if code:
        lines = [
            line for line in text.splitlines() if line.startswith("DEFECT ") or "ERROR: libFuzzer" in line
        ]
        defect = (lines or [text[-300:].strip() or f"exit code {code}"])[0].removeprefix("DEFECT ")
    executions = stats.get("number_of_executed_units", sum(report.get("outcomes", {}).values()))
    return {
        "executions": executions,
        "outcomes": report.get("outcomes", {}),
        "slowest_s": report.get("slowest_s"),
        "peak_rss_mb": stats.get("peak_rss_mb"),
        "defect": defect,
    }


def seeds(name: str) -> list[bytes]:
    """The corpus of a target: honest files, and what earlier runs found to reach other branches."""
    with tempfile.TemporaryDirectory() as work:
        honest = TARGETS[name](Path(work)).seeds
    folder = CORPUS / name
    return (
        [*honest, *(path.read_bytes() for path in sorted(folder.iterdir()))] if folder.is_dir() else [*honest]
    )


def _keep(name: str, inputs: Path) -> None:
    """Have small inputs of a finished run that reached new branches join the corpus."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    room = _KEPT_FILES - len(list(folder.iterdir()))
    new = sorted(
        (path for path in inputs.iterdir() if not path.name.startswith("seed-")),
        key=lambda path: path.stat().st_size,
    )
    small = [path.read_bytes() for path in new if 0 < path.stat().st_size <= _KEPT_BYTES]
    for content in small[:: max(1, len(small) // max(1, room))][: max(0, room)]:
        (folder / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)


def _repeat(names: Sequence[str], path: Path) -> int:
    """Try one input with these targets; its traceback is shown."""
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            print(name, try_input(TARGETS[name](Path(work)), path.read_bytes()))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="targets to fuzz, such as 'tensors-*'")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=2, help="targets at once")
    parser.add_argument("--keep", action="store_true", help="let new inputs join the corpus")
    parser.add_argument(
        "--repeat", metavar="FILE", help="try this one input with the targets, and show what happens"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
