"""Sentencepiece models written by hand, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that has a length."""
    assert len(content) < 2**14
    length = (
        bytes([len(content)])
        if len(content) < 2**7
        else bytes([len(content) & 0x7F | 0x80, len(content) >> 7])
    )
    return bytes([number << 3 | 2]) + length + content


def number(at: int, value: int) -> bytes:
    return bytes([at << 3, value])


def piece(text: str, score: float, kind: int) -> bytes:
    return field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + number(3, kind)


def model_bytes(pieces: Sequence[tuple[str, float, int]], *, kind: int = 2, adds_space: bool = True) -> bytes:
    """A model of pieces with text, score and type; `kind` 2 is BPE."""
    each = b"".join(field(1, piece(*one)) for one in pieces)
    return each + field(2, number(3, kind)) + field(3, number(3, int(adds_space)))
