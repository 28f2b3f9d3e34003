"""Where benchmarks work and keep what they measured, and what a number depends on beside the code."""

import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.comparison.machine import processor, versions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench"
RESULTS = ROOT / "docs/results"
VERSIONS = ("streamconv", "torch", "bitsandbytes", "peft", "transformers", "safetensors")


def machine(folder: Path) -> dict[str, str | int]:
    """What a number depends on: processor, memory, kernel, file system of `folder`, versions, commit."""
    return {
        **processor(),
        "kernel": platform.release().partition("-")[0],
        "file_system": _said("stat", "-f", "-c", "%T", str(folder)),
        "python": platform.python_version(),
        **versions(VERSIONS),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit, marked where anything but results differs from it."""
    git = ("git", "-C", str(ROOT))
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/results")
    commit = _said(*git, "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if changed else commit


def save(path: Path, made_by: str, results: Mapping[str, Any]) -> None:
    """Write `results` as JSON, whole or not at all: a benchmark saves after every step and may be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"made_by": made_by, **results}, indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What was saved; nothing if nothing was."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _said(*command: str) -> str:
    return _output(*command) or "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
