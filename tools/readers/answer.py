"""What a reader is asked on its command line, and the file that it answers with; knows nothing of streamconv."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TOKENS = (1, 5, 9, 14, 22, 3, 7)


@dataclass(frozen=True, slots=True)
class Question:
    """`tokens`: one sequence. `dtype`: what the program is told to compute in, where it has the choice."""

    model: Path
    out: Path
    tokens: list[int]
    dtype: str


def questions(description: str | None) -> list[Question]:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="MODEL OUT",
        help="folder of a model, or a .gguf file, and the .safetensors file to write; may be repeated",
    )
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="token ids, by commas")
    parser.add_argument(
        "--dtype", default="auto", help="what to compute in, where the program has the choice"
    )
    given = parser.parse_args()
    if len(given.files) % 2:
        parser.error("give a file to write for every model")
    tokens = [int(each) for each in given.tokens.split(",")]
    pairs = zip(given.files[::2], given.files[1::2], strict=True)
    return [Question(model, out, tokens, given.dtype) for model, out in pairs]


def answer(
    question: Question, packages: tuple[str, ...], logits: Any, weights: Mapping[str, Any], **more: Any
) -> None:
    """Write `logits` [tokens, vocabulary] and `more` of its kind, and weights; the versions go to the metadata."""
    tensors = {"logits": logits, **more, **{f"weights/{name}": each for name, each in weights.items()}}
    whole = {name: np.ascontiguousarray(each, dtype=np.float32) for name, each in tensors.items()}
    save_file(whole, question.out, {package: version(package) for package in packages})
    shape = whole["logits"].shape
    sys.stdout.write(f"{question.out}: logits of {shape[0]} tokens, {len(weights)} weights\n")
