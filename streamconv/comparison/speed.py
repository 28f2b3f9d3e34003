"""Memory to load a model and speed to decode, measured in a process of its own with stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamconv.comparison.result import Speed

_PROGRAM = "import sys; from streamconv.comparison.loading import answer; answer(*sys.argv[1:])"
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Opened:
    """Model to open: a folder, with an adapter's beside it or without. `load_in` are settings of bitsandbytes that
    quantizes while loading.
    """

    model: str
    adapter: str | None = None
    load_in: Mapping[str, object] | None = None


def measure_speed(
    opened: Opened, tokens: int, device: str, folder: Path, check_stop: Callable[[], None]
) -> Speed:
    """Loads `opened` on `device` and decodes `tokens` tokens. Notes lie in `folder`, which exists.

    `check_stop` is called all the time; where it raises, the process is ended.
    """
    asked, answered, said = (folder / name for name in ("speed-asked.json", "speed.json", "speed.log"))
    for note in (asked, answered, said):  # of an earlier run; a link would be followed
        note.unlink(missing_ok=True)
    asked.write_text(json.dumps({**asdict(opened), "tokens": tokens, "device": device}))
    with said.open("xb") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(asked), str(answered)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            code = _wait(child, check_stop)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    check_stop()  # Ctrl-C ends the child, too: then it has found nothing out
    if code or not answered.exists():
        last = (said.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return _speed({"problem": f"the process that opened it ended with {code}: {last}"}, tokens, device)
    return _speed(json.loads(answered.read_text()), tokens, device)


def _wait(child: subprocess.Popen[bytes], check_stop: Callable[[], None]) -> int:
    while True:
        check_stop()
        try:
            return child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _speed(found: Mapping[str, Any], tokens: int, device: str) -> Speed:
    nothing = dict.fromkeys(("load_seconds", "load_peak_bytes", "load_peak_vram_bytes", "tokens_per_s"))
    return Speed(**{**nothing, **found, "tokens": tokens, "device": device})
