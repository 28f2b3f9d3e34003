"""Calibration of a job: its text and what the model can do with it, read for planning.

The model's layers are found by transformers, an extra: it is imported inside a function, for jobs that calibrate.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from streamconv.checkpoint.config import edit_config
from streamconv.errors import CheckpointError, InputError, OptionError
from streamconv.output.verifier import hash_file
from streamconv.planning.base import Base
from streamconv.planning.calibration import CalibrationFacts
from streamconv.planning.options import Calibration
from streamconv.storage.data_sets import DataSet, data_set_of, pinned

# Libraries of the extra `eval`; modules that need them are imported once they are there.
_NEEDED = ("transformers", "accelerate")


def read_calibration_facts(base: Base, asked: Calibration) -> CalibrationFacts:
    """Facts that planning a calibration needs, the text's SHA-256 among them.

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
    """Data set at its present commit, whose name stands for content that may be larger than any disk.

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
    except CheckpointError as error:
        raise InputError(f"{option} {error}") from error
