"""Readers: every byte once, errors, and the number of threads that a disk's behaviour leads to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.checkpoint import readers as module
from streamconv.checkpoint.readers import MAX_READERS, Readers

TILE = 8 << 20


class Disk:
    """Answers in the time that `speed` says for so many requests at once, by a clock of its own."""

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed = speed
        self.now = 0.0

    def run(self, readers: Readers, tiles: int) -> list[int]:
        """The number of readers at each tile."""
        counts = []
        for _ in range(tiles):
            parts: list[int] = []
            lock = threading.Lock()

            def read(start: int, stop: int, parts: list[int] = parts, lock: threading.Lock = lock) -> None:
                with lock:
                    parts.append(stop - start)
                    if sum(parts) == TILE:
                        self.now += TILE / self.speed(len(parts))

            counts.append(readers.count)
            readers.share(TILE, read)
        return counts


def settled(speed: Callable[[int], float], tiles: int = 100) -> list[int]:
    disk = Disk(speed)
    with Readers(clock=lambda: disk.now) as readers:
        return disk.run(readers, tiles)


def test_a_disk_that_gains_nothing_keeps_one_reader() -> None:
    counts = settled(lambda count: 1e9)
    assert counts[0] == counts[-1] == 1
    assert sum(count > 1 for count in counts) == module.WINDOW_BYTES // TILE


def test_a_volume_that_answers_many_at_once_gets_many() -> None:
    counts = settled(lambda count: 1e8 * count)
    assert sorted(set(counts)) == [1, 2, 4, 8]
    assert counts[-1] == MAX_READERS


def test_the_number_stops_where_more_are_no_faster() -> None:
    counts = settled(lambda count: 1e8 * min(count, 4))
    assert counts[-1] == 4


def test_it_is_tried_again_when_the_network_changes() -> None:
    disk = Disk(lambda count: 1e9)
    with Readers(clock=lambda: disk.now) as readers:
        disk.run(readers, 100)
        assert readers.count == 1
        disk.speed = lambda count: 1e8 * count
        disk.run(readers, 600)
        assert readers.count == MAX_READERS


def test_small_reads_do_not_count() -> None:
    disk = Disk(lambda count: 1e8 * count)
    with Readers(clock=lambda: disk.now) as readers:
        disk.run(readers, 9)
        assert readers.count == 2
        for _ in range(10_000):
            readers.share(100_000, lambda start, stop: None)
        assert readers.count == 2


@given(st.integers(0, 9 << 20), st.sampled_from([1, 2, 4, 8]))
def test_every_byte_is_read_once(nbytes: int, count: int) -> None:
    parts: list[range] = []
    with Readers() as readers:
        readers.count = count
        readers.share(nbytes, lambda start, stop: parts.append(range(start, stop)))
    parts.sort(key=lambda part: part.start)
    assert len(parts) <= count
    assert sum(map(len, parts)) == nbytes
    assert all(left.stop == right.start for left, right in itertools.pairwise(parts))


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_comes_out_when_nobody_reads_any_more(failing: int) -> None:
    reading = threading.Semaphore(4)

    def read(start: int, stop: int) -> None:
        with reading:
            if start == failing * (stop - start):
                raise OSError(f"part {failing}")
            threading.Event().wait(0.02)

    with Readers() as readers:
        readers.count = 4
        with pytest.raises(OSError, match=f"part {failing}"):
            readers.share(TILE, read)
        assert all(reading.acquire(blocking=False) for _ in range(4))
