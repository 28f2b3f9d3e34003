"""Progress bars for Python: tqdm's, in a notebook the notebook's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from streamconv.progress import OnProgress


@contextmanager
def bar(title: str, is_shown: bool, on_progress: OnProgress) -> Iterator[OnProgress]:
    """`on_progress`, and where it `is_shown` a bar of the bytes that are done."""
    if not is_shown:
        yield on_progress
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of notebooks that lack ipywidgets: the bar is text there
        from tqdm.auto import tqdm

        drawn = tqdm(desc=title, unit="B", unit_scale=True)

    def draw(done: int, total: int) -> None:
        if drawn.total is None:
            drawn.total, drawn.n, drawn.initial = total, done, done
        drawn.update(done - drawn.n)
        on_progress(done, total)

    try:
        yield draw
    finally:
        drawn.close()
