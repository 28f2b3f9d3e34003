"""Pieces of a sentencepiece model with scores and types (`sentencepiece_model.proto`): what its header needs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from streamconv.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; those of tokens in GGUF files have the same numbers but for UNUSED, 5 in both, and BYTE, 6."""

_BPE = 2


@dataclass(frozen=True, slots=True)
class Pieces:
    """Texts, scores and types in the order of ids; `adds_space`: one is put before the text."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    adds_space: bool
    is_bpe: bool


def read_pieces(raw: bytes, where: str) -> Pieces:
    """Pieces of a model. Raises CheckpointError for bytes that are none."""
    texts, scores, types = [], [], []
    adds_space, is_bpe = True, False
    try:
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                text, score, kind = _piece(value)
                texts.append(text)
                scores.append(score)
                types.append(kind)
            elif number == 2 and isinstance(value, bytes):  # trainer_spec: model_type is its third field
                is_bpe = any(field == 3 and each == _BPE for field, each in _fields(value))
            elif number == 3 and isinstance(value, bytes):  # normalizer_spec: add_dummy_prefix
                adds_space = not any(field == 3 and each == 0 for field, each in _fields(value))
    except (IndexError, UnicodeDecodeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{where} is not a sentencepiece model") from error
    if not texts:
        raise CheckpointError(f"{where} is not a sentencepiece model: it has no pieces")
    return Pieces(tuple(texts), tuple(scores), tuple(types), adds_space, is_bpe)


def _piece(raw: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise ValueError("no such type of piece")
    return text, score, kind


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of a protobuf message by number: numbers, or bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError("no such wire type")
        length = {1: 8, 5: 4}.get(wire)
        if length is None:
            length, at = _varint(raw, at)
        if at + length > len(raw):
            raise ValueError("cut short")
        yield tag >> 3, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")
