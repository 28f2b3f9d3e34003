"""Pieces of sentencepiece models, written by hand as protobuf."""

from __future__ import annotations

import random
import struct

import pytest

from streamconv.errors import CheckpointError, StreamconvError
from streamconv.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, read_pieces
from tests.gguf.pieces import field, model_bytes, piece

PIECES = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("<0x00>", 0.0, BYTE), ("\u2581the", -1.5, NORMAL)]


def test_pieces_with_scores_and_types() -> None:
    found = read_pieces(model_bytes(PIECES), "tokenizer.model")
    assert found.texts == tuple(text for text, _, _ in PIECES)
    assert found.scores == (0.0, 0.0, 0.0, -1.5)
    assert found.types == (UNKNOWN, CONTROL, BYTE, NORMAL)
    assert found.adds_space
    assert found.is_bpe


def test_what_the_model_says_of_itself() -> None:
    found = read_pieces(model_bytes(PIECES, kind=1, adds_space=False), "tokenizer.model")
    assert not found.adds_space
    assert not found.is_bpe


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "it has no pieces"),
        (b"no protobuf at all", "is not a sentencepiece model"),
        (field(1, b"\x0a\x05ab"), "is not a sentencepiece model"),
        (field(1, piece("a", 0.0, 9)), "is not a sentencepiece model"),
        (field(1, field(1, b"\xff")), "is not a sentencepiece model"),
        (field(1, field(2, b"ab")), "is not a sentencepiece model"),
        (b"\xff" * 20, "is not a sentencepiece model"),
    ],
)
def test_what_is_none_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_pieces(raw, "tokenizer.model")


def test_no_damage_gives_anything_but_pieces_or_an_error_of_ours() -> None:
    whole, chance = model_bytes(PIECES), random.Random(0)
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            read_pieces(bytes(raw[: chance.randrange(len(raw) + 1)]), "tokenizer.model")
        except StreamconvError:
            continue


def test_fixed_numbers_are_passed_over() -> None:
    other = bytes([9 << 3 | 1]) + struct.pack("<d", 1.0) + bytes([9 << 3 | 5]) + struct.pack("<f", 1.0)
    assert read_pieces(other + model_bytes(PIECES), "tokenizer.model").texts[0] == "<unk>"
