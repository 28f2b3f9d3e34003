"""BlockWriter: a file written in order in whole blocks, whatever the pieces and wherever they lie in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv import disk
from streamconv.checkpoint import blocks
from streamconv.checkpoint.blocks import BlockWriter
from streamconv.disk import BLOCK

CONTENT = np.random.default_rng(0).bytes(40 * BLOCK + 700)
NBYTES = st.integers(0, 9 * BLOCK)


@contextmanager
def writing(path: Path, offset: int = 0) -> Iterator[BlockWriter]:
    """A writer whose file has all before `offset`; closed in the end, and the file's descriptor with it."""
    plain = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.pwrite(plain, CONTENT[:offset], 0)
        direct = disk.open_direct(path, plain, os.O_WRONLY)
        if direct is None:
            pytest.skip("the file system of the tests has no direct writing")
        writer = BlockWriter(plain, direct, offset)
        yield writer
        writer.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(direct)
    finally:
        os.close(plain)


def in_memory(content: bytes, offset: int, *, fits: bool) -> memoryview:
    """`content` in memory that lies as the file offset does, or 16 bytes behind."""
    memory = disk.blocks(len(content) + 2 * BLOCK)
    start = offset % BLOCK + (0 if fits else 16)
    memory[start : start + len(content)] = content
    return memory[start : start + len(content)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GATHERED_BYTES", 4 * BLOCK)


@pytest.mark.parametrize("gathered", [1, 4])
@settings(deadline=None, max_examples=40)  # it waits for the disk
@given(st.lists(st.tuples(NBYTES, st.booleans(), st.booleans()), max_size=7), st.integers(0, 2 * BLOCK))
def test_the_bytes_are_the_same_however_they_come(
    tmp_path_factory: pytest.TempPathFactory,
    gathered: int,
    pieces: Sequence[tuple[int, bool, bool]],
    offset: int,
) -> None:
    """Pieces that lie well in memory or not, some flushed after; begun anywhere, as a run that is resumed does."""
    vars(blocks)["GATHERED_BYTES"] = gathered * BLOCK
    path = tmp_path_factory.getbasetemp() / "blocks"
    path.unlink(missing_ok=True)
    done = offset
    with writing(path, offset) as writer:
        for nbytes, fits, flushes in pieces:
            piece = CONTENT[done : done + nbytes]
            if piece:
                writer.append(in_memory(piece, done, fits=fits))
            done += len(piece)
            if flushes:
                writer.flush()
                assert path.read_bytes()[:done] == CONTENT[:done]
        writer.flush()
    assert path.read_bytes() == CONTENT[:done]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where and how much is written, as it is."""
    made: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def noting(descriptor: int, data: memoryview, offset: int) -> int:
        made.append((offset, len(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    return made


def test_what_lies_well_is_written_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(tmp_path / "file", 100) as writer:
        made = calls(monkeypatch)
        writer.append(in_memory(CONTENT[100 : 20 * BLOCK + 50], 100, fits=True))
        assert made == [(0, BLOCK), (BLOCK, 19 * BLOCK)]
        writer.append(in_memory(CONTENT[20 * BLOCK + 50 : 21 * BLOCK], 50, fits=False))
        assert len(made) == 2
        writer.append(in_memory(CONTENT[21 * BLOCK : 26 * BLOCK], 0, fits=False))
        assert made[2:] == [(20 * BLOCK, 4 * BLOCK)]
        writer.flush()
        assert made[3:] == [(24 * BLOCK, 2 * BLOCK)]
    assert (tmp_path / "file").read_bytes() == CONTENT[: 26 * BLOCK]


def refusing(code: int, which: Callable[[int], bool]) -> Callable[..., int]:
    """`pwrite` that fails for the descriptors that `which` says."""
    pwrite = os.pwrite

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        if which(descriptor):
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, offset)

    return failing


def is_direct(descriptor: int) -> bool:
    return bool(
        int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:\t")[1].split()[0], 8)
        & os.O_DIRECT
    )


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_where_the_system_refuses_after_all_it_is_written_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with writing(tmp_path / "file", 100) as writer:
        monkeypatch.setattr(os, "pwrite", refusing(code, is_direct))
        for start, stop in ((100, 9000), (9000, 9 * BLOCK), (9 * BLOCK, 30 * BLOCK + 1)):
            writer.append(in_memory(CONTENT[start:stop], start, fits=start != 9000))
        writer.flush()
    assert (tmp_path / "file").read_bytes() == CONTENT[: 30 * BLOCK + 1]


def test_a_disk_that_takes_a_part_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the direct writes a whole block at first, then a part that is none."""
    pwrite, parts = os.pwrite, iter([BLOCK, 1000])

    def in_parts(descriptor: int, data: memoryview, offset: int) -> int:
        return pwrite(descriptor, data[: next(parts, 5000)], offset)

    with writing(tmp_path / "file") as writer:
        monkeypatch.setattr(os, "pwrite", in_parts)
        writer.append(in_memory(CONTENT, 0, fits=True))
        writer.flush()
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_after_an_error_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept of the piece that failed may not get into the file."""
    with writing(tmp_path / "file") as writer:
        writer.append(memoryview(CONTENT[:100]))
        monkeypatch.setattr(os, "pwrite", refusing(errno.ENOSPC, lambda _: True))
        with pytest.raises(OSError, match="No space left"):
            writer.append(memoryview(CONTENT[100 : 6 * BLOCK]))
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            writer.append(memoryview(b"x"))
        with pytest.raises(OSError, match="No space left"):
            writer.flush()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_file_that_was_cut_short_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:50])
    descriptor = os.open(path, os.O_RDWR)
    with pytest.raises(OSError, match="cut short"):
        BlockWriter(descriptor, descriptor, 100)
    os.close(descriptor)
