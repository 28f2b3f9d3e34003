"""What an owner's library is asked on its command line, and the file that it answers with; knows nothing of streamconv.

    python -m tools.owners.by_OWNER WEIGHTS OUT FORMAT [--group-size N] [--scales DTYPE] [--template FILE.gguf]

Without arguments it reads them from lines of its input, and says "done" after each. WEIGHTS is a .safetensors file of
float32 matrices. OUT gets, by the same names and in float32, the values of what the library makes of each by nearest
rounding; its metadata say how many bytes that takes, and with which versions.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Asked:
    """`scales`: dtype in which the format's scales are stored beside a model in bfloat16.

    `template`: a .gguf file of the same model, for its metadata, names and the types of its tensors.
    """

    weights: Mapping[str, Matrix]
    out: Path
    format: str
    group_size: int
    scales: str
    template: Path | None


def questions(description: str | None) -> Iterator[Asked]:
    """What is asked on the command line, or on each line of the input."""
    if len(sys.argv) > 1:
        yield _asked(description, sys.argv[1:])
        return
    for line in sys.stdin:
        yield _asked(description, shlex.split(line))
        sys.stdout.write("done\n")
        sys.stdout.flush()


def _asked(description: str | None, arguments: Sequence[str]) -> Asked:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("format")
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--scales", default="float32")
    parser.add_argument("--template", type=Path)
    given = parser.parse_args(arguments)
    weights = load_file(given.weights)
    return Asked(weights, given.out, given.format, given.group_size, given.scales, given.template)


def answer_each(asked: Asked, packages: tuple[str, ...], requantize: Callable[[str, Matrix], Any]) -> None:
    """Answer with what `requantize` makes of each weight: its values and the bytes of its tensors."""
    values, taken = {}, 0
    for name, weight in asked.weights.items():
        values[name], nbytes = requantize(name, weight)
        taken += nbytes
    answer(asked, packages, values, taken)


def answer(asked: Asked, packages: tuple[str, ...], values: Mapping[str, Any], taken: int) -> None:
    """Write `values`, and in the metadata the bytes `taken` and the versions of `packages`."""
    whole = {name: np.ascontiguousarray(each, dtype=np.float32) for name, each in values.items()}
    said = {package: version(package) for package in packages}
    save_file(whole, asked.out, {"bytes": str(taken), **said})
