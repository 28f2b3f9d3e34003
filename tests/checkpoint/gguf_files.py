"""GGUF files written by hand, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
_SCALARS = {0: "B", UINT32: "I", 5: "i", FLOAT32: "f", 7: "?", 10: "Q"}

Tensors = Mapping[str, tuple[int, tuple[int, ...], bytes]]
"""Type, shape as PyTorch has it, and bytes, by name."""


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(kind: int, value: object) -> bytes:
    if kind == STRING:
        return text(str(value))
    if kind == ARRAY:
        assert isinstance(value, tuple)
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(value_bytes(inner, item) for item in items)
    return struct.pack(f"<{_SCALARS[kind]}", value)


def gguf_bytes(
    pairs: Mapping[str, tuple[int, object]], tensors: Tensors, version: int = 3, alignment: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, (kind, value) in pairs.items():
        head += text(key) + struct.pack("<I", kind) + value_bytes(kind, value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + bytes(-len(head) % alignment) + data
