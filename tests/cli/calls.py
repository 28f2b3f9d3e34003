"""The command line called in this process, and what it leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from streamconv.cli import main


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    @property
    def options(self) -> list[str]:
        return ["--base", str(self.base), "--adapter", str(self.adapter)]


def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env=env)


def succeed(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
    result = run(*arguments, env=env)
    assert result.exit_code == 0, result.output
    return result


def plan_json(*arguments: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("plan", "--json", *arguments, env=env).stdout)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
