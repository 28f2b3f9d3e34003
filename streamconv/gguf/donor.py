"""A GGUF file of a base that others made: its tokenizer, and what else its header says of the model, for one of ours.

Converters know more tokenizers than can be made of transformers' files here, and what stands in a header says how
llama.cpp computes. Numbers that config.json tells, too, must be the same in both. What a header says of a file itself,
who made it and of which types it is, is not the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from streamconv.checkpoint.gguf import GgufFile
from streamconv.checkpoint.gguf_header import GgufValue, Pairs, stored_value
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape
from streamconv.errors import CheckpointError

TOKENIZER = "tokenizer."
_ARCHITECTURE = "general.architecture"
_TOKENS = "tokenizer.ggml.tokens"
_WAY = "give a GGUF file of the very base model"


def donor_pairs(where: str, files: Sequence[GgufFile], pairs: Pairs, shapes: Mapping[str, Shape]) -> Pairs:
    """Pairs that a header with these `pairs` is given: all of the donor's tokenizer, and others of its architecture.

    `where` is the donor, `files` are its headers; `shapes` those of the output's tensors. Raises CheckpointError,
    which names the first difference, where the two are not of one model.
    """
    first = files[0]
    architecture = pairs[_ARCHITECTURE].value
    kind = first.pairs.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"--gguf-donor {where} has general.type {shown(kind)}, expected a model; {_WAY}"
        )
    if first.pairs.get(_ARCHITECTURE) != architecture:
        raise _other(where, _ARCHITECTURE, first.pairs.get(_ARCHITECTURE), architecture)
    if _TOKENS not in first.pairs:
        raise CheckpointError(
            f"--gguf-donor {where} has no tokenizer ({_TOKENS}); give another file, or leave it out"
        )
    _check_tensors(where, {name: each.shape for file in files for name, each in file.tensors.items()}, shapes)
    found: dict[str, GgufValue] = {}
    for key, value in first.pairs.items():
        if key.startswith(TOKENIZER):
            found[key] = stored_value(first, key)
        elif key in pairs and key.startswith(f"{architecture}."):
            if not _are_same(value, pairs[key].value):
                raise _other(where, key, value, pairs[key].value)
        elif key.startswith(f"{architecture}."):
            found[key] = stored_value(first, key)
    return found


def _check_tensors(where: str, theirs: Mapping[str, Shape], ours: Mapping[str, Shape]) -> None:
    """Raise CheckpointError where there are other tensors, or other shapes of them, in the order of ours."""
    for name, shape in ours.items():
        if theirs.get(name) != shape:
            found = "none" if name not in theirs else f"one of shape {list(theirs[name])}"
            raise CheckpointError(
                f"--gguf-donor {where} has {found} that is called {name}, expected shape {list(shape)};"
                f" {_WAY}"
            )
    if more := sorted(theirs.keys() - ours.keys()):
        raise CheckpointError(
            f"--gguf-donor {where} has a tensor {shown(more[0])}, and the output has none; {_WAY}"
        )


def _are_same(theirs: object, ours: object) -> bool:
    """Whether two values are the same numbers or texts; floats of a file are rounded."""
    if isinstance(theirs, tuple) and isinstance(ours, Sequence) and not isinstance(ours, str):
        return len(theirs) == len(ours) and all(map(_are_same, theirs, ours))
    if isinstance(theirs, float) and isinstance(ours, int | float):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return theirs == ours


def _other(where: str, key: str, theirs: object, ours: object) -> CheckpointError:
    return CheckpointError(
        f"--gguf-donor {where} has {key} {shown(theirs)}, and by the base's config.json it is {shown(ours)};"
        f" {_WAY}"
    )
