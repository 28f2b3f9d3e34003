"""Files that come while others are read: their order, how many are held, what is removed, what is raised."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from streamconv.errors import HubError, StoreError
from streamconv.progress import OnBytes
from streamconv.storage import arrivals
from streamconv.storage.arrivals import ALL_HERE, Arrivals, Unit, most_held
from streamconv.storage.base import RangeReader, SourceFile

A, B, C, D = (SourceFile(name, f"/far/{name}", 1, "object:1") for name in "abcd")


def units(*files: str) -> list[Unit]:
    return [frozenset({"a": A, "b": B, "c": C, "d": D}[name] for name in each) for each in files]


@dataclass
class Far:
    """A storage that notes what is fetched and removed; `errors` are raised one after another."""

    location: str = "far"
    origin: None = None
    here: set[str] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    most: int = 0

    def names(self, subfolder: str | None = None) -> tuple[str, ...]:
        raise NotImplementedError

    def folders(self) -> tuple[str, ...]:
        raise NotImplementedError

    def file(self, name: str) -> SourceFile:
        raise NotImplementedError

    def read_bytes(self, name: str, limit: int) -> bytes:
        raise NotImplementedError

    def read_start(self, file: SourceFile, length: int) -> bytes:
        raise NotImplementedError

    def open(self, file: SourceFile) -> RangeReader:
        raise NotImplementedError

    def missing(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        return tuple(file for file in files if file.name not in self.here)

    def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
        for file in files:
            with self.lock:
                if self.errors:
                    raise self.errors.pop(0)
                self.here.add(file.name)
                self.told.append(f"+{file.name}{'!' if for_now else ''}")
                self.most = max(self.most, len(self.here))
            on_bytes(file.size)

    def done(self, file: SourceFile) -> None:
        with self.lock:
            self.here.discard(file.name)
            self.told.append(f"-{file.name}")


def go_through(storage: Far, work: Sequence[Unit], low_disk: bool = False) -> Arrivals:
    """One lane that reads the units."""
    with Arrivals(storage, work, low_disk) as found:
        over = 0
        for unit in work:
            assert found.wait(unit, lambda: False)
            assert {file.name for file in unit} <= storage.here
            found.read(unit)
            removed = found.over(over)
            over += len(removed)
            found.remove(removed)
    return found


def test_files_come_in_the_order_of_their_first_use_and_stay() -> None:
    storage = Far(here={"b"})
    go_through(storage, units("a", "ab", "c", "a"))
    assert storage.told == ["+a", "+c"]
    assert storage.here == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("work", "most"),
    [
        (units("a", "b", "c", "d"), 2),
        (units("a", "a", "b", "c", "d"), 2),
        (units("a", "ab", "b", "bc", "c", "d"), 3),
        (units("a", "b", "c", "d", "a"), 3),
        (units("abcd"), 4),
        (units("a"), 1),
    ],
)
def test_with_low_disk_no_more_are_held_than_are_needed_and_one(work: Sequence[Unit], most: int) -> None:
    assert most_held(work) == most
    storage = Far()
    found = go_through(storage, work, low_disk=True)
    assert storage.most == found.peak <= most
    assert storage.here == set()
    assert sorted(storage.told) == sorted(
        sign + name + mark
        for name in {f.name for u in work for f in u}
        for sign, mark in (("+", "!"), ("-", ""))
    )


def test_lanes_count_each_for_itself() -> None:
    assert most_held(units("a", "b", "c", "d"), lanes=2) == 3
    assert most_held(units("a", "b", "c", "d"), lanes=9) == 4


def test_what_somebody_waits_for_comes_whatever_is_held() -> None:
    """Lanes may be further than the order says: d is wanted while a, which all are held back for, is in work."""
    storage = Far()
    work = units("a", "b", "c", "d")
    with Arrivals(storage, work, low_disk=True) as found:
        assert found.wait(work[0], lambda: False)
        assert found.wait(work[3], lambda: False)
    assert storage.here >= {"a", "d"}
    assert "c" not in storage.here


def test_a_file_is_removed_once_by_however_many_lanes() -> None:
    storage = Far()
    with Arrivals(storage, units("a"), low_disk=True) as found:
        assert found.wait(frozenset({A}), lambda: False)
        found.read(frozenset({A}))
        for _ in range(2):
            found.remove(found.over(0))
    assert storage.told == ["+a!", "-a"]


def test_a_fetch_that_fails_on_the_way_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "PAUSES_S", (0.0, 0.0))
    storage = Far(errors=[HubError("cut"), HubError("cut")])
    go_through(storage, units("a"))
    assert storage.here == {"a"}


@pytest.mark.parametrize("error", [HubError("cut"), StoreError("denied"), OSError("disk")])
def test_the_last_failure_is_raised_where_the_file_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(arrivals, "PAUSES_S", (0.0, 0.0))
    storage = Far(errors=[error] * 9)
    with Arrivals(storage, units("a", "b")) as found, pytest.raises(type(error)) as caught:
        found.wait(frozenset({B}), lambda: False)
    assert caught.value is error
    assert len(storage.errors) == (6 if isinstance(error, HubError) else 8)


def test_nobody_waits_when_all_is_over() -> None:
    class Slow(Far):
        def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
            del files, for_now
            while True:
                on_bytes(0)

    with Arrivals(Slow(), units("a")) as found:
        assert not found.wait(frozenset({A}), lambda: True)
    assert threading.active_count() < 20


def test_files_that_are_all_here_are_not_waited_for() -> None:
    assert ALL_HERE.wait(frozenset({A}), lambda: True)
    ALL_HERE.read(frozenset({A}))
    ALL_HERE.remove([A])
    assert ALL_HERE.over(0) == ()
