"""Direct reading and writing: the same bytes wherever they lie, and what the system is asked and may refuse."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamconv import disk
from streamconv.disk import BLOCK

CONTENT = np.random.default_rng(0).bytes(5 * BLOCK + 1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def plain(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def direct(path: Path, plain: int) -> Iterator[int]:
    descriptor = disk.open_direct(path, plain, os.O_RDONLY)
    if descriptor is None:
        pytest.skip("the file system of the tests has no direct reading")
    yield descriptor
    os.close(descriptor)


def placed(offset: int, nbytes: int) -> memoryview:
    """Memory full of 1 that lies as the file offset does."""
    memory = disk.blocks(nbytes + BLOCK)
    start = disk.place(memory, offset, nbytes)
    view = memory[start : start + nbytes]
    view[:] = b"\1" * nbytes
    return view


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, BLOCK),
        (0, 5 * BLOCK + 1000),
        (8, 16),
        (8, BLOCK),
        (BLOCK - 8, 16),
        (4000, 3 * BLOCK),
        (BLOCK, BLOCK + 8),
        (2 * BLOCK + 104, 3 * BLOCK + 896),
    ],
)
def test_bytes_are_read_wherever_they_lie(direct: int, offset: int, nbytes: int) -> None:
    view = placed(offset, nbytes)
    assert disk.is_direct(view, offset)
    assert disk.read_direct(direct, offset, view) == nbytes
    assert view == CONTENT[offset : offset + nbytes]


@pytest.mark.parametrize(
    ("offset", "there"), [(5 * BLOCK, 1000), (4 * BLOCK + 8, BLOCK + 992), (6 * BLOCK, 0)]
)
def test_the_end_of_the_file_shows(direct: int, offset: int, there: int) -> None:
    view = placed(offset, 2 * BLOCK)
    assert disk.read_direct(direct, offset, view) == there
    assert view[:there] == CONTENT[offset:]


def test_a_part_of_a_block_that_is_not_there_is_not_taken_for_read(direct: int) -> None:
    assert disk.read_direct(direct, 5 * BLOCK + 1200, placed(5 * BLOCK + 1200, 8)) == 0


def test_memory_that_lies_otherwise_is_refused_by_the_system(direct: int) -> None:
    view = disk.blocks(3 * BLOCK)[8 : 8 + BLOCK]
    assert not disk.is_direct(view, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        os.preadv(direct, [view], 0)


@pytest.mark.parametrize(
    ("offset", "nbytes", "start"),
    [
        (0, 100, 0),
        (800, 100, 800),
        (BLOCK + 8, BLOCK, 8),
        (802, 100, 0),
        (800, 2 * BLOCK - 799, 0),
        (800, 0, 0),
    ],
    ids=["begin", "inside", "next block", "odd", "no room", "empty"],
)
def test_the_place_in_memory_is_that_of_the_file(offset: int, nbytes: int, start: int) -> None:
    assert disk.place(disk.blocks(2 * BLOCK), offset, nbytes) == start


def test_another_file_in_the_place_of_the_open_one_is_not_taken(
    path: Path, plain: int, tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(CONTENT)
    (tmp_path / "other").replace(path)
    before = len(os.listdir("/proc/self/fd"))
    assert disk.open_direct(path, plain, os.O_RDONLY) is None
    assert disk.open_direct(tmp_path / "gone", plain, os.O_RDONLY) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_system_without_direct_reading_reads_otherwise(
    path: Path, plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    assert disk.open_direct(path, plain, os.O_RDONLY) is None


def test_what_is_in_the_page_cache_is_told(path: Path, plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.pread(plain, len(CONTENT), 0)
    assert disk.is_cached(plain, 100, 2 * BLOCK)
    os.sync()
    os.posix_fadvise(plain, 0, 0, os.POSIX_FADV_DONTNEED)
    system = subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True
    ).stdout
    assert disk.is_cached(plain, 100, 2 * BLOCK) == (system.strip() == "tmpfs")
    monkeypatch.setattr(mmap, "mmap", _refusing)
    assert disk.is_cached(plain, 100, 2 * BLOCK)


def _refusing(*_: object, **__: object) -> mmap.mmap:
    raise OSError(errno.ENODEV, "No such device")


def test_what_cannot_be_done_is_told(path: Path, plain: int) -> None:
    assert disk.allocate(plain, 10) == errno.EBADF  # it is open for reading alone
    with path.with_name("to").open("wb") as target:
        assert disk.allocate(target.fileno(), 10) in disk.NOT_SUPPORTED | {0}
        assert disk.share_blocks(plain, target.fileno()) in (True, False)
    disk.sync_data(plain)
    disk.advise(plain, 0, 0, "SEQUENTIAL")
