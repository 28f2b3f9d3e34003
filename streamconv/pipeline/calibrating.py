"""Calibration of a job: what planning needs of it, its budget, and the pass that makes the codes.

What computes needs transformers, an extra: it is imported by name, for jobs that calibrate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from streamconv.calibration.subject import Calibrated, Subject
from streamconv.errors import InputError, OptionError, ResourceError
from streamconv.executor import StopRequest
from streamconv.journal import make_folder
from streamconv.plan import Calibration, Need, Plan
from streamconv.planner import Base, Grounds
from streamconv.sidecars import edit_config
from streamconv.sizes import format_size
from streamconv.storage.data_sets import data_set_commit
from streamconv.verifier import hash_file

# What the extra `eval` brings, and what is imported once it is there.
_NEEDED = ("transformers", "accelerate")
_TEXT = "streamconv.forward.text"
_LAYERS = "streamconv.forward.linears"
_NEED = "streamconv.calibration.need"
_WALK = "streamconv.calibration.walk"


def read_grounds(base: Base, asked: Calibration) -> Grounds:
    """What planning a calibration needs, the text's SHA-256 among it.

    Raises OptionError without the libraries, InputError without the text, UnsupportedError for a model that is none
    of theirs.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"calibration needs {' and '.join(missing)}, not installed here; run pip install 'streamconv[eval]', or "
            "leave --calibration out"
        )
    named = import_module(_TEXT).data_set_of(asked.data)
    sha256 = _hash_text(Path(asked.data).expanduser()) if named is None else _hash_data_set(*named)
    config = edit_config(base.index.config, dtype=None, quantization=None, untie=False, vocab_size=None)
    layers = import_module(_LAYERS).find_layers(config, base.index.storage.location, base.weights)
    name = Path(asked.data).name if named is None else asked.data
    is_data_set = named is not None
    return Grounds(asked.data, name, sha256, is_data_set, layers.weights, layers.positions, layers.version)


def _hash_data_set(name: str, split: str) -> str:
    """SHA-256 of the data set's present commit: of what lies elsewhere, and may be larger than any disk.

    Raises OptionError where the library that reads it is missing.
    """
    if find_spec("datasets") is None:
        raise OptionError(
            f"--calibration {name} is no file, and reading it as a data set of the Hub needs datasets, not installed "
            "here; run pip install 'streamconv[datasets]', or give a .txt or .jsonl file"
        )
    commit = data_set_commit(name)
    return hashlib.sha256(f"{name}@{commit}:{split}".encode()).hexdigest()


def _hash_text(text: Path) -> str:
    if not text.is_file():
        raise InputError(
            f"--calibration {text} is no file; give a .txt, or a .jsonl with text or messages in every line"
        )
    try:
        return hash_file(str(text), lambda _: None)
    except OSError as error:
        raise InputError(f"--calibration {text} cannot be read: {error.strerror}") from error


def with_need(subject: Subject) -> Plan:
    """The plan with what its calibration needs. Raises ResourceError where a budget cannot hold that."""
    plan = subject.plan
    assert plan.calibration is not None
    need: Need = import_module(_NEED).calibration_need(subject)
    budgets = (
        ("--max-ram", need.ram, plan.options.max_ram_bytes),
        ("--max-vram", need.vram, plan.options.max_vram_bytes),
    )
    for option, needed, budget in budgets:
        if needed > budget:
            raise ResourceError(
                f"{option} {format_size(budget)} is too small to calibrate this model: its largest decoder layer, the "
                f"statistics of its widest inputs and one sequence of {plan.calibration.sequence_length} tokens need "
                f"{math.ceil(needed / 2**20)}MiB; allow that much, or give a shorter --calibration-sequence-length"
            )
    return replace(plan, calibration=replace(plan.calibration, need=need))


def calibrate(
    subject: Subject, folder: Path, on_bytes: Callable[[int], None], stop: StopRequest
) -> Mapping[str, Calibrated]:
    """By weight, its bytes, which lie in `folder`, and what became of its update.

    Goes on where an earlier call stopped; on a folder that is complete, reads what that holds.
    """
    make_folder(folder)
    done = 0

    def tell(now: int, total: int) -> None:
        nonlocal done
        del total
        on_bytes(now - done)
        done = now

    found: Mapping[str, Calibrated] = import_module(_WALK).calibrate(subject, folder, tell, stop)
    return found


def described(calibrated: Mapping[str, Calibrated]) -> dict[str, dict[str, float]]:
    """What a report says of each weight."""
    return {name: dict(found.notes) for name, found in sorted(calibrated.items())}
