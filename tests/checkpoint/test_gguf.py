"""Headers of GGUF files: what is read, and every lie refused, whatever it claims."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch

from streamconv.checkpoint.gguf import GgufFile, read_gguf
from streamconv.checkpoint.reader import TensorReader
from streamconv.errors import CheckpointError, StreamconvError, UnsupportedError
from streamconv.storage.base import SourceFile
from tests.checkpoint.gguf_files import ARRAY, STRING, UINT32, gguf_bytes, text

PAIRS: dict[str, tuple[int, object]] = {
    "general.type": (STRING, "adapter"),
    "n": (UINT32, 7),
    "names": (ARRAY, (STRING, ["a", "b"])),
    "flag": (7, True),
}
VALUES = torch.arange(6, dtype=torch.float32)
TENSORS = {
    "one": (0, (2, 3), VALUES.numpy().tobytes()),
    "half": (1, (3,), VALUES[:3].half().numpy().tobytes()),
}


def read(folder: Path, raw: bytes) -> GgufFile:
    path = folder / "a.gguf"
    path.write_bytes(raw)
    return read_gguf(SourceFile("a.gguf", str(path), len(raw), "1"))


@pytest.mark.parametrize("version", [2, 3])
def test_pairs_and_tensors(tmp_path: Path, version: int) -> None:
    found = read(tmp_path, gguf_bytes(PAIRS, TENSORS, version))
    assert found.pairs == {"general.type": "adapter", "n": 7, "names": ("a", "b"), "flag": True}
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {"one": (2, 3), "half": (3,)}
    with TensorReader() as reader:
        assert torch.equal(reader.load(found.tensors["one"]), VALUES.reshape(2, 3))
        assert torch.equal(reader.load(found.tensors["half"]), VALUES[:3].half())


def test_another_alignment(tmp_path: Path) -> None:
    raw = gguf_bytes({"general.alignment": (UINT32, 64)}, TENSORS, alignment=64)
    with TensorReader() as reader:
        assert torch.equal(reader.load(read(tmp_path, raw).tensors["one"]), VALUES.reshape(2, 3))


def test_a_long_header_is_read_in_several_steps(tmp_path: Path) -> None:
    raw = gguf_bytes({"tokens": (ARRAY, (STRING, ["token"] * 100_000))}, TENSORS)
    assert len(read(tmp_path, raw).pairs["tokens"]) == 100_000  # type: ignore[arg-type]


HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "begins with"),
        (b"PK\x03\x04" + bytes(40), "must be a GGUF file, found one that begins with"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "of version 1; supported is GGUF of version 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "written for big-endian machines"),
        (HEAD + struct.pack("<QQ", 2**63, 0), "its header does not end within"),
        (HEAD + struct.pack("<QQ", 0, 2**63), "its header does not end within"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(64), "its header does not end within"),
        (HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<I", 99), "a value of type 99"),
        (
            HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, UINT32, 2**61),
            "its header does not end within",
        ),
        (
            HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1),
            "an array of type 9",
        ),
        (
            HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0),
            "not UTF-8",
        ),
        (HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<I", 5), "has 5 axes"),
        (
            HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
            "lies over another, or where none may begin",
        ),
        (
            HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 2, 0, 7),
            "lies over another, or where none may begin, at byte 7",
        ),
        (
            HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 64, 0, 0),
            "ends beyond the file",
        ),
        (
            HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 2, 77, 0),
            "stored as type 77",
        ),
        (gguf_bytes({"general.alignment": (UINT32, 0)}, {}), "general.alignment must be a size, found 0"),
    ],
)
def test_a_lie_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=says):
        read(tmp_path, raw)


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    twice = HEAD + struct.pack("<QQ", 0, 2) + 2 * (text("k") + struct.pack("<II", UINT32, 1))
    with pytest.raises(CheckpointError, match="the key 'k' stands twice"):
        read(tmp_path, twice)
    entry = text("t") + struct.pack("<IQIQ", 1, 0, 0, 0)
    with pytest.raises(CheckpointError, match="'t' stands twice"):
        read(tmp_path, HEAD + struct.pack("<QQ", 2, 0) + 2 * entry + bytes(64))


def test_no_damage_gives_anything_but_a_header_or_an_error_of_ours(tmp_path: Path) -> None:
    whole = gguf_bytes(PAIRS, TENSORS)
    chance = random.Random(0)
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            read(tmp_path, bytes(raw[: chance.choice([len(raw), chance.randrange(len(raw))])]))
        except StreamconvError:
            continue
