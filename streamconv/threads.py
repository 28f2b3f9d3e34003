"""Threads: the one door through which ours are started, which never waits for ever.

`threading.Thread.start` waits until the new thread says that it runs. One that finds no memory for its first stack
frame never does, and the whole run would hang: here it is another thread that waits, and ours for START_S at most.
"""

from __future__ import annotations

import functools
import queue
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterable
from typing import Any, Generic, Self, TypeVar, TypeVarTuple, cast

from streamconv.system_errors import no_thread

Given = TypeVarTuple("Given")
Item = TypeVar("Item")
Found = TypeVar("Found")

START_S = 30.0
"""Seconds that a new thread may take to run: a busy machine takes some, one without memory all of them."""


def start_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """A thread that runs `work`, and does not keep the process alive. Raises ResourceError where none can be had."""
    thread = threading.Thread(target=work, name=f"streamconv-{name}", daemon=True)
    refused: list[BaseException] = []
    has_begun = allocate_lock()  # to set an Event takes memory; to release a lock does not
    has_begun.acquire()

    def start() -> None:
        try:
            thread.start()
        except BaseException as error:
            refused.append(error)
        finally:
            has_begun.release()

    try:
        start_new_thread(start, ())
    except (RuntimeError, MemoryError) as error:
        raise no_thread(str(error) or "no memory") from error
    if not has_begun.acquire(timeout=START_S):
        raise no_thread(f"a new one did not run within {START_S:.0f} s, probably for want of memory")
    if refused:
        raise no_thread(str(refused[0]) or "no memory") from refused[0]
    return thread


def check_threads(count: int) -> None:
    """Raise ResourceError unless `count` threads can be had at once."""
    is_over = threading.Event()
    try:
        started = [start_thread(is_over.wait, f"trial_{number}") for number in range(count)]
    finally:
        is_over.set()
    for thread in started:
        thread.join()


class Future(Generic[Found]):
    """The outcome of submitted work, once there is one. Unlike Python's own, to tell of it takes no memory."""

    def __init__(self, work: Callable[[], Found]) -> None:
        self._work: Callable[[], Found] | None = work
        self._outcome: Found | None = None
        self._error: BaseException | None = None
        self._is_open = allocate_lock()
        self._is_open.acquire()

    def result(self) -> Found:
        """The result, for which it waits; raises what the work raised."""
        error = self.exception()
        if error is not None:
            raise error
        return cast("Found", self._outcome)

    def exception(self) -> BaseException | None:
        """The error of the work, None if it ended well; waits for its end."""
        with self._is_open:
            return self._error

    def carry_out(self) -> None:
        assert self._work is not None
        try:
            self._outcome = self._work()
        except BaseException as error:  # raised in the thread that asks
            self._error = error
        finally:
            self._work = None  # and the memory that it works on
            self._is_open.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._is_open.release()


class Pool:
    """Threads, at most `count`, that do what is submitted, in its order; each is started when it is first needed.

    `prepare` is called in every thread before anything else. Use as a context manager, or call `shutdown`.
    """

    def __init__(self, count: int, name: str, prepare: Callable[[], None] | None = None) -> None:
        self._count, self._name, self._prepare = count, name, prepare
        self._threads: list[threading.Thread] = []
        self._free = 0  # threads that wait for work; too many once all are started, when nothing hangs on it
        self._changing = threading.Lock()
        self._todo: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def submit(self, work: Callable[[*Given], Found], *given: *Given) -> Future[Found]:
        """Have `work` done. Raises ResourceError where it needs a thread that cannot be had."""
        future = Future(functools.partial(work, *given))
        with self._changing:
            if self._free:
                self._free -= 1
            elif len(self._threads) < self._count:
                self._threads.append(start_thread(self._serve, f"{self._name}_{len(self._threads)}"))
            self._todo.put(future)
        return future

    def map(self, work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
        """Results of `work` for all items, in order; the first error in order is raised, once all are done."""
        futures = [self.submit(work, item) for item in items]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def shutdown(self) -> None:
        """Return when all that was submitted is done and every thread has ended."""
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
            while (future := self._todo.get()) is not None:
                future.carry_out()
                del future  # and with it the memory that its work has made
                with self._changing:
                    self._free += 1
        except BaseException as error:  # who waits must learn of it
            while (future := self._todo.get()) is not None:
                future.fail(error)
