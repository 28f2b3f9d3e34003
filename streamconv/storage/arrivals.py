"""Files that come while others are read: the next shards of a model are fetched while one is converted.

They come in the order of their first use, one after another. Where disk is short, a file is removed after its last
use, and no more are held than the work needs at once and one that comes meanwhile. Work may read several files at once
(parts of one weight lie in two shards, several shards are in work); so what somebody waits for is fetched whatever the
number of those that are held.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self

from streamconv.errors import HubError, Stopped
from streamconv.storage.base import SourceFile, Storage
from streamconv.storage.hub_errors import is_passing
from streamconv.threads import start_thread

PAUSES_S = (1.0, 4.0, 15.0)
"""Seconds to wait before a fetch that failed is tried again; object stores are asked again piece by piece."""

_LOOK_EVERY_S = 0.2
_LAST_WORD_S = 1.0

Unit = frozenset[SourceFile]
"""Files that one piece of work reads."""


class Incoming(Protocol):
    """Files that work is done on, whether they are here already or not."""

    def wait(self, files: Unit, is_over: Callable[[], bool]) -> bool:
        """Wait until all of them are here; False where `is_over` said before that there is nothing to wait for."""

    def read(self, files: Unit) -> None:
        """Note that a piece of work has read them."""

    def over(self, since: int) -> Sequence[SourceFile]:
        """Files that nobody will read again, in the order in which that came to be, but for the first `since`."""

    def remove(self, files: Iterable[SourceFile]) -> None:
        """Remove files that are over and that the caller has closed."""


class AllHere:
    """Files that are all here, and stay."""

    def wait(self, files: Unit, is_over: Callable[[], bool]) -> bool:
        del files, is_over
        return True

    def read(self, files: Unit) -> None:
        del files

    def over(self, since: int) -> Sequence[SourceFile]:
        del since
        return ()

    def remove(self, files: Iterable[SourceFile]) -> None:
        del files


ALL_HERE = AllHere()


class Arrivals:
    """Incoming that are fetched by a thread; use as a context manager.

    `units` are all pieces of work, in their order. With `low_disk`, files are removed after their last use, and at most
    `most_held(units, lanes)` of those that were fetched are here at once.
    """

    def __init__(
        self, storage: Storage, units: Sequence[Unit], low_disk: bool = False, lanes: int = 1
    ) -> None:
        self._storage, self._low_disk = storage, low_disk
        self._left = Counter(file for unit in units for file in unit)
        self._todo = dict.fromkeys(storage.missing(dict.fromkeys(file for unit in units for file in unit)))
        self._most = most_held(units, lanes) if low_disk else len(self._todo)
        self._held: set[SourceFile] = set()
        self._wanted: set[SourceFile] = set()
        self._over: list[SourceFile] = []
        self._removed: set[SourceFile] = set()
        self._error: BaseException | None = None
        self._is_stopped = False
        self._changed = threading.Condition()
        self.peak = 0
        """Most files that were here at once of those that were fetched, the one that was coming among them."""

    def __enter__(self) -> Self:
        self._thread = start_thread(self._fetch_all, "arrivals")
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join(
            _LAST_WORD_S
        )  # a library may not let a request be ended; the thread keeps nothing alive

    def wait(self, files: Unit, is_over: Callable[[], bool]) -> bool:
        """See Incoming. Raises what ended the fetching."""
        with self._changed:
            while coming := [file for file in files if file in self._todo]:
                if self._error is not None:
                    raise self._error
                if is_over():
                    return False
                self._wanted.update(coming)
                self._changed.notify_all()
                self._changed.wait(_LOOK_EVERY_S)
            self._wanted.difference_update(files)
        return True

    def read(self, files: Unit) -> None:
        """See Incoming."""
        with self._changed:
            for file in files:
                self._left[file] -= 1
                if not self._left[file] and self._low_disk:
                    self._over.append(file)

    def over(self, since: int) -> Sequence[SourceFile]:
        """See Incoming."""
        return self._over[since:]

    def remove(self, files: Iterable[SourceFile]) -> None:
        """See Incoming."""
        for file in files:
            with self._changed:
                is_first = file not in self._removed
                self._removed.add(file)
            if is_first:
                self._storage.done(file)
            with self._changed:
                self._held.discard(file)
                self._changed.notify_all()

    def _fetch_all(self) -> None:
        try:
            while (file := self._next()) is not None:
                self._fetch(file)
                with self._changed:
                    del self._todo[file]
                    self._changed.notify_all()
        except BaseException as error:  # whoever waits raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> SourceFile | None:
        """The file to fetch next: what somebody waits for, else what is used first, when there is room for it."""
        with self._changed:
            while self._todo and not self._is_stopped:
                wanted = next((file for file in self._todo if file in self._wanted), None)
                if wanted is not None or len(self._held) < self._most:
                    found = wanted or next(iter(self._todo))
                    self._held.add(found)
                    self.peak = max(self.peak, len(self._held))
                    return found
                self._changed.wait()
        return None

    def _fetch(self, file: SourceFile) -> None:
        for pause in (*PAUSES_S, None):
            try:
                self._storage.fetch((file,), self._go_on, self._low_disk)
                return
            except HubError as error:
                if pause is None or not is_passing(error):
                    raise
                with self._changed:
                    self._changed.wait_for(lambda: self._is_stopped, pause)
                self._go_on(0)

    def _go_on(self, _: int) -> None:
        if self._is_stopped:
            raise Stopped("stopped", 0)  # seen by nobody: what ended the run is raised


def most_held(units: Sequence[Unit], lanes: int = 1) -> int:
    """Most fetched files that are here at once, where `lanes` go through the units and files go after their last use.

    As many as are between their first and last use at any unit, for each lane, and one that comes meanwhile.
    """
    left = Counter(file for unit in units for file in unit)
    here: set[SourceFile] = set()
    most = 0
    for unit in units:
        here |= unit
        most = max(most, len(here))
        left.subtract(unit)
        here -= {file for file in unit if not left[file]}
    return min(len(left), lanes * most + 1)
