"""Files as torch.save writes them, with a pickle made by hand."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PREFIX = "archive"
BOMB_STEPS = 40


def write_archive(path: Path, pickled: bytes, entries: Mapping[str, bytes] | None = None) -> None:
    """An archive with this pickle, 64 bytes of one storage, and further `entries`."""
    contents = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", "data/0": bytes(64)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {**contents, **(entries or {})}.items():
            archive.writestr(f"{PREFIX}/{name}", content)


def state(value: bytes, name: bytes = b"a") -> bytes:
    """A dict with the one value whose opcodes these are."""
    return b"\x80\x02}" + _text(name) + value + b"s."


def tensor(
    shape: Sequence[int] = (4, 4),
    stride: Sequence[int] = (4, 1),
    offset: int = 0,
    numel: int = 16,
    storage: str = "FloatStorage",
    key: bytes = b"0",
) -> bytes:
    """Opcodes of a tensor, whose storage is the entry `data/KEY`."""
    place = b"(" + _text(b"storage") + _global("torch", storage) + _text(key) + _text(b"cpu") + _number(numel)
    arguments = b"(" + place + b"tQ" + _number(offset) + _tuple(shape) + _tuple(stride) + b"\x89"
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + arguments
        + _made("collections", "OrderedDict")
        + b"tR"
    )


def called(module: str, name: str, *numbers: int) -> bytes:
    """Opcodes that call a function with numbers."""
    return _global(module, name) + _tuple(numbers) + b"R"


def hash_bomb(steps: int = BOMB_STEPS, wide: int = 2) -> bytes:
    """A dict whose key is a tuple that holds one tuple `wide` times, which holds another, and so on."""
    return b"\x80\x02})q\x00" + (b"(" + b"h\x00" * wide + b"tq\x00") * steps + b"Ns."


def _made(module: str, name: str) -> bytes:
    return _global(module, name) + b")R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def _number(number: int) -> bytes:
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
