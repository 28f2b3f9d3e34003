"""A disk that is really full: 4 MiB of tmpfs, mounted where only the process under test sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MOUNT = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -m tests.hostile.full_disk "$1"'
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What happened in every scenario of full_disk.py."""
    may_mount = shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], check=False).returncode
    if not may_mount:
        pytest.skip(
            "a tmpfs of one's own takes unprivileged user namespaces, which this machine does not allow"
        )
    folder = str(tmp_path_factory.mktemp("disk"))
    command = [*NAMESPACE, "sh", "-c", MOUNT, "sh", folder, sys.executable]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def test_a_shard_that_does_not_fit_is_refused_at_once_and_leaves_nothing(found: Any) -> None:
    error, message = found["too_large_to_begin"]["create"]
    assert error == "ResourceError"
    assert "/a: the disk is full (4194304 bytes are free) with 20971520 bytes still to be written" in message
    assert found["too_large_to_begin"]["left"] == []


def test_the_space_of_a_shard_is_its_own(found: Any) -> None:
    result = found["small_file_beside_a_reserved_shard"]
    assert result["small"][0] == "ResourceError"
    assert ".config.json.partial: the disk is full" in result["small"][1]
    assert result["kept"] == "old"
    assert result["left"] == ["a", "config.json"]


def test_a_disk_that_fills_up_stops_the_shard_and_it_resumes(found: Any) -> None:
    result = found["filled_while_writing_then_resumed"]
    assert result["write"][0] == "ResourceError"
    assert "/a: the disk is full" in result["write"][1]
    assert result["whole"]
    assert result["left"] == ["a"]
