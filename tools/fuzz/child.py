"""A process that fuzzes one target until its time is up: python -m tools.fuzz.child TARGET FOLDER REPORT [libFuzzer's]

atheris ends the process itself, so what the trials came to is written to REPORT again and again.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris
import torch

# Libraries are not to be guided through: their branches say nothing of ours. They come first.
import transformers  # noqa: F401

with atheris.instrument_imports(include=["streamconv"], enable_loader_override=False):
    from tools.fuzz.targets import TARGETS
    from tools.fuzz.trial import Defect, check_clean, try_input

_TELL_EVERY_S = 2.0


def main() -> None:
    name, _, report, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as work:
        target = TARGETS[name](Path(work))
        outcomes: Counter[str] = Counter()
        slowest, told = 0.0, time.monotonic()

        def one(data: bytes) -> None:
            nonlocal slowest, told
            try:
                trial = try_input(target, data)
            except Defect as defect:
                print(f"DEFECT {defect}", file=sys.stderr)
                raise
            outcomes["read" if trial.exit_code is None else f"exit {trial.exit_code}"] += 1
            slowest = max(slowest, trial.seconds)
            if time.monotonic() - told > _TELL_EVERY_S:
                check_clean()
                told = time.monotonic()
                found = {"outcomes": dict(outcomes), "slowest_s": round(slowest, 3)}
                Path(report).write_text(json.dumps(found))

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if chance.random() < 0.1:
                return bytes(atheris.Mutate(data, most))
            return target.mutate(data or chance.choice(target.seeds), chance)[:most]

        atheris.Setup([sys.argv[0], sys.argv[2], *flags], one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
