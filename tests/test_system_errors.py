"""What the system refuses, as errors of ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

import streamconv
from streamconv.errors import (
    CheckpointError,
    HubError,
    InputError,
    OutputError,
    ResourceError,
    StreamconvError,
)
from streamconv.storage.local import LocalFolder
from streamconv.system_errors import as_ours, lacking, translated, was_refused

OUT = Path("/models/out")


def of_system(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MemoryError(), ResourceError, "--max-ram"),
        (PackageNotFoundError("streamconv"), ResourceError, "installed streamconv cannot be found"),
        (of_system(errno.ENOMEM), ResourceError, "--max-ram"),
        (RuntimeError("std::bad_alloc"), ResourceError, "--max-ram"),
        (RuntimeError("can't allocate lock"), ResourceError, "--max-ram"),
        (ImportError("libx.so: failed to map segment from shared object"), ResourceError, "--max-ram"),
        (RuntimeError("can't start new thread"), ResourceError, "ulimit -u"),
        (of_system(errno.EAGAIN), ResourceError, "ulimit -u"),
        (of_system(errno.EMFILE, "/models/base/a"), ResourceError, "ulimit -n"),
        (of_system(errno.ENFILE), ResourceError, "ulimit -n"),
        (of_system(errno.ENOSPC, "/models/out/a"), ResourceError, "/models/out/a: the disk is full"),
        (of_system(errno.EDQUOT), ResourceError, "quota"),
        (of_system(errno.EIO), ResourceError, "Input/output error"),
        (of_system(errno.EIO, "/models/out/a"), OutputError, "/models/out/a cannot be written: Input/output"),
        (of_system(errno.EIO, "/models/outer/a"), InputError, "/models/outer/a cannot be used: Input/output"),
        (of_system(errno.ESTALE, "/models/base/a"), InputError, "/models/base/a cannot be used: Stale"),
        (of_system(errno.ECONNRESET), HubError, "network"),
        (TimeoutError("timed out"), HubError, "timed out"),
        (OSError("no such file is known to this library"), InputError, "no such file is known"),
        (RuntimeError("Symlink loop from '/models/out/a'"), OutputError, "/models/out/a cannot be written"),
        (RuntimeError("Could not determine home directory."), InputError, "~"),
        (
            RuntimeError("unable to open file </models/base/a> in read-write mode: Input/output error (5)"),
            InputError,
            "/models/base/a cannot be used: Input/output error",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_each_refusal_has_its_class(error: Exception, kind: type[StreamconvError], said: str) -> None:
    told = as_ours(error, OUT)
    assert type(told) is kind
    assert said in str(told)


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shapes differ"), KeyError(1), CheckpointError("x")], ids=str
)
def test_bugs_and_errors_of_ours_stay_what_they_are(error: Exception) -> None:
    assert as_ours(error, OUT) is None
    assert lacking(error) is None
    with pytest.raises(type(error)), translated(OUT):
        raise error


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EIO, True), (errno.EACCES, True), (errno.ENOENT, False)]
)
def test_a_disk_that_refuses_is_told_from_a_file_that_is_missing(number: int, refused: bool) -> None:
    error = CheckpointError("a cannot be read")
    assert not was_refused(error)
    error.__cause__ = of_system(number)
    assert was_refused(error) == refused


def test_memory_that_libraries_do_not_get_is_told() -> None:
    with pytest.raises(ResourceError, match="DefaultCPUAllocator"), translated():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ResourceError, match="Unable to allocate"), translated():
        np.empty(2**60, np.uint8)


@pytest.mark.parametrize("limit", [400_000_000, 700_000_000])
def test_a_limit_of_memory_is_an_error_of_ours(tmp_path: Path, limit: int) -> None:
    """Where not even the libraries can be loaded."""
    script = (
        "import resource, sys; from streamconv.__main__ import main;"
        f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}));"
        "sys.argv[1:] = ['inspect', sys.argv[1]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "ulimit -v" in done.stderr


def test_users_of_the_library_get_errors_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LocalFolder, subfolder: str | None = None) -> tuple[str, ...]:
        raise MemoryError

    text = tmp_path / "text.txt"
    text.write_text("text")
    monkeypatch.setattr(LocalFolder, "names", refuse)
    calls: tuple[Callable[[], object], ...] = (
        lambda: streamconv.merge(tmp_path, tmp_path, tmp_path / "out"),
        lambda: streamconv.convert(tmp_path, tmp_path / "out"),
        lambda: streamconv.inspect(tmp_path),
        lambda: streamconv.analyze(tmp_path, tmp_path),
        lambda: streamconv.evaluate(tmp_path, data=text),
        lambda: streamconv.extract(tmp_path, tmp_path, tmp_path / "out"),
        lambda: streamconv.compare(tmp_path, tmp_path, tmp_path / "out", data=text),
    )
    for call in calls:
        with pytest.raises(ResourceError, match="--max-ram"):
            call()
