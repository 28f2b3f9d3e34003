"""Calibration of a job: what planning needs of it, its budget, and the passes that make scales and codes.

The passes need transformers, an extra: they are imported inside functions, for jobs that calibrate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from streamconv.calibration.subject import Calibrated, Subject
from streamconv.checkpoint.config import edit_config
from streamconv.errors import InputError, OptionError, ResourceError
from streamconv.output.journal import make_folder
from streamconv.output.verifier import hash_file
from streamconv.planning.base import Base
from streamconv.planning.calibration import CalibrationFacts
from streamconv.planning.plan import Calibration, Plan
from streamconv.progress import OnBytes, StopRequest
from streamconv.sizes import format_size
from streamconv.storage.data_sets import DataSet, data_set_of, pinned

# Libraries of the extra `eval`; modules that need them are imported once they are there.
_NEEDED = ("transformers", "accelerate")


def read_grounds(base: Base, asked: Calibration) -> CalibrationFacts:
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
    data_set = data_set_of(asked.data)
    if data_set is None:
        data, name = asked.data, Path(asked.data).name
        sha256 = hash_text(Path(data).expanduser(), "--calibration")
    else:
        data = name = str(_pinned(data_set))
        sha256 = hashlib.sha256(data.encode()).hexdigest()
    config = edit_config(base.index.config, dtype=None, quantization=None, untie=False, vocab_size=None)
    from streamconv.forward.linears import find_layers

    layers = find_layers(config, base.index.storage.location, base.weights)
    return CalibrationFacts(
        data,
        name,
        sha256,
        data_set is not None,
        layers.weights,
        layers.positions,
        layers.version,
        layers.model_type,
        layers.heads,
    )


def _pinned(data_set: DataSet) -> DataSet:
    """At its present commit, whose name stands for content that may be larger than any disk.

    Raises OptionError where the library that reads it is missing.
    """
    if find_spec("datasets") is None:
        raise OptionError(
            f"--calibration {data_set.name} is no file, and reading it as a data set of the Hub needs datasets, not "
            "installed here; run pip install 'streamconv[datasets]', or give a .txt or .jsonl file"
        )
    return pinned(data_set)


def hash_text(text: Path, option: str) -> str:
    """SHA-256 of the text that is given as `option`. Raises InputError where it cannot be read."""
    if not text.is_file():
        raise InputError(
            f"{option} {text} is no file; give a .txt, or a .jsonl with text or messages in every line"
        )
    try:
        return hash_file(str(text), lambda _: None)
    except OSError as error:
        raise InputError(f"{option} {text} cannot be read: {error.strerror}") from error


def with_need(subject: Subject) -> Plan:
    """The plan with what its calibration needs. Raises ResourceError where a budget cannot hold that."""
    from streamconv.calibration.need import calibration_need

    plan = subject.plan
    assert plan.calibration is not None
    need = calibration_need(subject)
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
    subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest
) -> Mapping[str, Calibrated]:
    """By weight, its bytes, which lie in `folder`, and what became of its update.

    Goes on where an earlier call stopped; on a folder that is complete, reads what that holds.
    """
    from streamconv.calibration.layers import calibrate as walk

    make_folder(folder)
    return walk(subject, folder, on_bytes, stop)


def rescale(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Mapping[str, Calibrated]:
    """By weight, what it is rescaled by, which lies in `folder`; goes on as `calibrate` does."""
    from streamconv.calibration.equalizing import rescale as choose_scales

    make_folder(folder)
    return choose_scales(subject, folder, on_bytes, stop)


def described(calibrated: Mapping[str, Calibrated]) -> dict[str, dict[str, float]]:
    """What a report says of each weight."""
    return {name: dict(found.notes) for name, found in sorted(calibrated.items()) if found.notes}
