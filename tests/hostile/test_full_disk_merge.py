"""Merging onto a disk that is really full, at the command line: exit 5, nothing half done, and on with space."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamconv.pipeline import merge
from tests.hostile.test_full_disk import NAMESPACE, ROOT
from tests.models import Sizes, write_adapter, write_base

MOUNT = 'mount -t tmpfs -o size=4m tmpfs "$3" && exec "$1" -m tests.hostile.full_disk_merge "$2" "$3"'
SIZES = Sizes(hidden=128, inner=200, layers=3, vocabulary=700)
MOMENTS = ("at once", "first shard", "second shard", "journal", "publishing")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_base(folder / "base", SIZES.shapes)
    write_adapter(folder / "adapter", SIZES.shapes)
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    merge(inputs / "base", inputs / "adapter", out)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.fixture(scope="module")
def found(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What happened at every moment of full_disk_merge.py."""
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], check=False).returncode:
        pytest.skip(
            "a tmpfs of one's own takes unprivileged user namespaces, which this machine does not allow"
        )
    disk = str(tmp_path_factory.mktemp("disk"))
    command = [*NAMESPACE, "sh", "-c", MOUNT, "sh", sys.executable, str(inputs), disk]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_exit_5_with_nothing_half_done_and_the_same_run_goes_on_with_space(
    found: Any, whole: Mapping[str, str], moment: str
) -> None:
    full, again = found[moment]["full"], found[moment]["again"]
    assert full["code"] == 5, full["text"]
    assert full["text"].startswith("Error: ")
    assert full["text"].count("\n") == 1
    assert "config.json" not in full["files"]
    for name, sha256 in full["files"].items():
        assert sha256 == whole[name]
    assert again["code"] == 0, again["text"]
    assert again["files"] == whole


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        ("at once", r"needs 6\d\.?\d* MB and its disk has 4\.\d+ MB free: \S+ MB are missing"),
        ("first shard", "model-00001-of-00003.safetensors.partial: the disk is full"),
        ("second shard", "model-00002-of-00003.safetensors.partial: the disk is full"),
        ("journal", "journal.jsonl: the disk is full"),
        ("publishing", "the disk is full"),
    ],
)
def test_the_message_names_the_file(found: Any, moment: str, says: str) -> None:
    assert re.search(says, found[moment]["full"]["text"])
