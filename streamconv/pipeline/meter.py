"""Bytes done and memory used, while something runs."""

from __future__ import annotations

from streamconv.memory import anonymous_bytes
from streamconv.pipeline.job import OnProgress


class Meter:
    """Counts output bytes and samples memory while a run goes on."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total, self._on_progress = total, on_progress
        self._done = 0
        self._before = anonymous_bytes()
        self.peak = 0

    def start(self, done: int) -> None:
        self._done = done
        self._on_progress(self._done, self._total)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self.peak = max(self.peak, anonymous_bytes() - self._before)
        self._on_progress(self._done, self._total)
