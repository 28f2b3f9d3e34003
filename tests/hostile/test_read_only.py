"""Output folders that become read-only or go away while a merge is at work: exit 4, and on once they are there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.test_full_disk import ROOT
from tests.hostile.test_full_disk_merge import inputs, whole

__all__ = ["inputs", "whole"]

NAMESPACE = ["unshare", "--user", "--map-user=1000"]
CASES = (
    "read-only at once",
    "work folder read-only, second shard",
    "read-only, publishing",
    "work folder removed, second shard",
    "all removed, second shard",
    "work folder removed, publishing",
    "all removed, publishing",
)


@pytest.fixture(scope="module")
def found(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What happened in every case of read_only.py."""
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], check=False).returncode:
        pytest.skip(
            "being nobody special takes unprivileged user namespaces, which this machine does not allow"
        )
    place = str(tmp_path_factory.mktemp("place"))
    command = [*NAMESPACE, sys.executable, "-m", "tests.hostile.read_only", str(inputs), place]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_a_sentence_and_goes_on(found: Any, whole: Mapping[str, str], case: str) -> None:
    hindered, again = found[case]["hindered"], found[case]["again"]
    assert hindered["code"] == 4, hindered["text"]
    assert hindered["text"].startswith("Error: ")
    assert hindered["text"].count("\n") == 1
    assert "config.json" not in hindered["files"]
    for name, sha256 in hindered["files"].items():
        assert sha256 == whole[name]
    assert again["code"] == 0, again["text"]
    assert again["files"] == whole
