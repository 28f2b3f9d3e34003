"""Progress of a run: a bar on a terminal, elsewhere a line now and then; or lines of JSON, for logs that programs read.

A line of JSON has always the same keys:

    time              seconds since 1970
    event             phase: one begins; file: a file of the output is complete; progress: neither, but some seconds are
                      past
    phase             plan, download, open (the folder, what is there in it), wait (for other parts), the name of a pass
                      such as survey or calibrate, write, publish, done
    file, file_bytes  the file that is complete, and its size; null in other lines
    done_bytes, total_bytes        bytes of the phases that read and write, done and in all; null before they are known
    bytes_per_second, eta_seconds  as far as this run has come; null before it has
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamconv.cli.printing import say
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.progress import OnProgress, Turn

_LINE_EVERY_S = 30.0
JSON_EVERY_S = 5.0


@contextmanager
def progress(title: str, quiet: bool) -> Iterator[OnProgress]:
    """A tqdm bar on a terminal; elsewhere one plain line every 30 seconds."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread that looks after slow bars: starting one may wait for ever
        with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr) as bar:

            def draw(done: int, total: int) -> None:
                if bar.total is None:
                    bar.total, bar.n, bar.initial = total, done, done
                bar.update(done - bar.n)

            yield draw
    else:
        yield _plain_lines(title)


def _plain_lines(title: str) -> OnProgress:
    started = last = time.monotonic()
    first: int | None = None
    is_told = False  # that all is done, which some go on to say

    def tell(done: int, total: int) -> None:
        nonlocal first, last, is_told
        now = time.monotonic()
        if first is None:
            first = done
        elif not is_told and (now - last >= _LINE_EVERY_S or done >= total):
            last, is_told = now, done >= total
            speed = (done - first) / max(now - started, 1e-9)
            left = (total - done) / max(speed, 1.0)
            say(
                f"{title}: {format_size(done)} of {format_size(total)}, {format_size(speed)}/s, {left:.0f} s left",
                err=True,
            )

    return tell


class JsonLines:
    """Lines of JSON on stderr: at each turn, and between them one every few seconds at most."""

    def __init__(self) -> None:
        self._writing = threading.Lock()  # a file is complete in a thread of its own
        self._phase = ""
        self._done: int | None = None
        self._total: int | None = None
        self._first = 0
        self._began = self._last = time.monotonic()

    def turn(self, turn: Turn) -> None:
        if turn.nbytes is not None:
            self._write("file", turn.name, turn.nbytes)
        else:
            self._phase = turn.name
            self._write("phase")

    def begin(self, phase: str) -> None:
        """Begin what counts anew, such as a download."""
        self._done = self._total = None
        self._phase = phase
        self._write("phase")

    def progress(self, done: int, total: int) -> None:
        if self._done is None or total != self._total:
            self._first, self._began = done, time.monotonic()
        self._done, self._total = done, total
        if time.monotonic() - self._last >= JSON_EVERY_S:
            self._write("progress")

    def _write(self, event: str, file: str | None = None, nbytes: int | None = None) -> None:
        with self._writing:
            now = self._last = time.monotonic()
            done, total, rate = self._done, self._total, None
            if done is not None and done > self._first:
                rate = (done - self._first) / max(now - self._began, 1e-9)
            eta = None if rate is None or total is None or done is None else (total - done) / rate
            line = {
                "time": round(time.time(), 3),
                "event": event,
                "phase": self._phase,
                "file": file,
                "file_bytes": nbytes,
                "done_bytes": done,
                "total_bytes": total,
                "bytes_per_second": None if rate is None else round(rate),
                "eta_seconds": None if eta is None else round(eta, 1),
            }
            say(json.dumps(line), err=True)
