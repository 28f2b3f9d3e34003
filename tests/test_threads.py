"""Threads of ours: they start or say why not, and do what they are given."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from streamconv import threads
from streamconv.errors import InputError, ResourceError
from streamconv.threads import Pool, check_threads, start_thread
from tests.cli.calls import run


def nothing() -> None:
    pass


def refuse(*_: object) -> int:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=str)
def test_a_thread_that_cannot_be_had_is_a_resource_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise error

    monkeypatch.setattr(threads, "start_new_thread", refused)
    with pytest.raises(ResourceError, match="no thread can be started"):
        start_thread(nothing, "test")


def test_a_thread_that_python_refuses_later_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError, match="can't start new thread"):
        start_thread(nothing, "test")


@pytest.mark.parametrize("dies", ["the thread itself", "the one that waits for it"])
def test_a_thread_that_dies_before_it_runs_is_not_waited_for(
    dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that finds no memory for its first frame: it never says that it has begun."""
    monkeypatch.setattr(threads, "START_S", 0.05)
    if dies == "the thread itself":
        monkeypatch.setattr(threading.Thread, "start", lambda _: threading.Event().wait(5))
    else:
        monkeypatch.setattr(threads, "start_new_thread", lambda *_: 0)
    began = time.monotonic()
    with pytest.raises(ResourceError, match="did not run within"):
        start_thread(nothing, "test")
    assert time.monotonic() - began < 4


def test_a_thread_has_a_name_and_does_not_keep_the_process_alive() -> None:
    seen: list[threading.Thread] = []
    thread = start_thread(lambda: seen.append(threading.current_thread()), "test")
    thread.join()
    assert seen == [thread]
    assert (thread.name, thread.daemon) == ("streamconv-test", True)


def test_the_threads_of_libraries_are_tried_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or OpenBLAS, which finds none, would send the process a Ctrl-C."""
    before = threading.active_count()
    check_threads(3)
    assert threading.active_count() == before
    assert run("formats").exit_code == 0
    monkeypatch.setattr(threads, "start_new_thread", refuse)
    done = run("formats")
    assert (done.exit_code, done.stderr.partition(" (")[0]) == (5, "Error: no thread can be started")


def test_a_pool_starts_no_thread_before_it_is_used_and_no_more_than_it_needs() -> None:
    before = threading.active_count()
    with Pool(3, "test") as pool:
        assert threading.active_count() == before
        for number in range(5):
            assert pool.submit(lambda given: given + 1, number).result() == number + 1
            time.sleep(0.02)  # the thread has counted itself free
        assert threading.active_count() == before + 1
        assert pool.map(lambda given: given * 2, range(20)) == [2 * number for number in range(20)]
        assert threading.active_count() <= before + 3
    assert threading.active_count() == before


def test_submitted_work_runs_side_by_side() -> None:
    both = threading.Barrier(3)
    with Pool(2, "test") as pool:
        futures = [pool.submit(both.wait, 10) for _ in range(2)]
        both.wait(10)
        assert {future.result() for future in futures} <= {0, 1, 2}


def test_errors_come_out_in_the_order_of_what_was_submitted() -> None:
    def work(number: int) -> None:
        if number:
            raise InputError(f"number {number}")

    with Pool(2, "test") as pool:
        future = pool.submit(work, 7)
        assert str(future.exception()) == "number 7"
        with pytest.raises(InputError, match="number 7"):
            future.result()
        with pytest.raises(InputError, match="number 1"):
            pool.map(work, range(4))


def test_every_thread_is_prepared_and_where_that_fails_who_waits_learns_of_it() -> None:
    def fail() -> None:
        raise MemoryError

    seen = threading.local()
    with Pool(2, "test", lambda: setattr(seen, "ready", True)) as pool:
        assert pool.map(lambda _: seen.ready, range(8)) == [True] * 8
    with Pool(2, "test", fail) as pool:
        futures: list[Callable[[], object]] = [pool.submit(nothing).result for _ in range(3)]
        for result in futures:
            with pytest.raises(MemoryError):
                result()


def test_what_was_submitted_is_done_although_a_further_thread_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, seen = threading.Event(), list[int]()

    def work() -> None:
        gate.wait(10)
        seen.append(1)

    with Pool(2, "test") as pool:
        pool.submit(work)
        monkeypatch.setattr(threads, "start_new_thread", refuse)
        with pytest.raises(ResourceError):
            pool.submit(work)
        gate.set()
    assert seen == [1]
