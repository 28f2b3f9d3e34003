"""Progress of a run: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamconv.cli.printing import say
from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.progress import OnProgress

_LINE_EVERY_S = 30.0


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
