"""Mutations that keep a file readable as far as they do not touch it: JSON, JSON lines, safetensors, plain bytes.

A mutation of bytes alone seldom gets past the first parser. Here a value of the tree is exchanged, a key repeated, a
shape changed with the header's length following it; and now and then a byte all the same.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

_DEEP = 3000
_MOST_DEPTH = 20
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -0.0, 1e308, 0.5, float("nan"), float("inf")),
    *("", "x", "auto", "..", "/etc/passwd", "\x1b]0;x\x07", "\u202e", "\ud800", "true", "1", "a" * 5000),
    *([], {}, [[]], [None], [1, 2], ["x"], {"x": 1}, {"": {}}),
)


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """`data` with a run of bytes flipped, cut out, repeated, or exchanged."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.choice((1, 1, 4, 16, 200)))
        match chance.randrange(5):
            case 0 if found:
                found[min(at, len(found) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                del found[at:end]
            case 2:
                found[at:at] = found[at:end]
            case 3:
                found[at:end] = chance.randbytes(end - at)
            case _:
                found[at:end] = chance.choice(
                    (b"\0", b"\xff", b"\n", b'"', b"{", b"[", b"-1", b"\xef\xbb\xbf")
                )
    return bytes(found)


def mutated_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON text with some nodes changed; where `data` is none, its bytes are."""
    if chance.random() < 0.15:
        return mutated_bytes(data, chance)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutated_bytes(data, chance)
    try:
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            tree = _changed(tree, chance)
        text = json.dumps(tree)
    except RecursionError:
        return mutated_bytes(data, chance)
    return _disturbed(text, chance).encode("utf-8", "surrogatepass")


def mutated_lines(data: bytes, chance: random.Random) -> bytes:
    """Lines of JSON: some changed, exchanged, repeated or gone, the last one perhaps torn."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return mutated_bytes(data, chance)
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[other])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[-1] = lines[-1][: chance.randrange(len(lines[-1]) + 1)]
        case _:
            lines[at] = mutated_json(lines[at].rstrip(b"\n"), chance) + b"\n"
    return b"".join(lines)


def mutated_shard(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file: its header changed, and the length before it right again; or some of its values."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data) or chance.random() < 0.1:
        return mutated_bytes(data, chance)
    header, values = data[8:start], data[start:]
    if chance.random() < 0.5:
        return data[:start] + mutated_bytes(values, chance)[: len(values)].ljust(len(values), b"\0")
    header = mutated_json(header, chance)
    if chance.random() < 0.2:
        values = mutated_bytes(values, chance)
    return struct.pack("<Q", len(header)) + header + values


def _changed(tree: Any, chance: random.Random) -> Any:
    """The tree with one node exchanged for an odd one or another of its own, renamed, or gone."""
    places = _places(tree)
    place = chance.choice(places)
    if not place:
        return copy.deepcopy(chance.choice(ODD)) if chance.random() < 0.2 else tree
    owner = _node(tree, place[:-1])
    match chance.randrange(6):
        case 0:
            del owner[place[-1]]
        case 1:
            owner[place[-1]] = copy.deepcopy(_node(tree, chance.choice(places[1:])))
        case 2 if isinstance(owner, dict):
            owner[f"{place[-1]}{chance.choice(('x', '.', '_', '/..'))}"] = owner.pop(place[-1])
        case _:
            owner[place[-1]] = _near(owner[place[-1]], chance)
    return tree


def _near(value: Any, chance: random.Random) -> Any:
    """A value that is nearly right, or not at all."""
    if isinstance(value, bool) or chance.random() < 0.5:
        return copy.deepcopy(chance.choice(ODD))
    if isinstance(value, int):
        return value + chance.choice((-1, 1, 2, value, -value, 64))
    if isinstance(value, str) and value:
        at = chance.randrange(len(value))
        return value[:at] + chance.choice(("", "x", "0", "F", ".", "*", "\n", "é")) + value[at + 1 :]
    return [value] if chance.random() < 0.5 else {"x": value}


def _disturbed(text: str, chance: random.Random) -> str:
    """Now and then what no tree can have: a repeated key, very deep nesting, an endless number."""
    match chance.randrange(40):
        case 0:
            return text.replace("{", '{"x": 1, "x": 2, ', 1)
        case 1:
            return text.replace(":", ": " + "[" * _DEEP, 1)
        case 2:
            return text.replace(": 1", ": " + "1" * 5000, 1)
    return text


def _places(tree: Any) -> Sequence[tuple[Any, ...]]:
    """Paths of all nodes that are not very deep, the root's first."""
    found: list[tuple[Any, ...]] = []
    left: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    while left:
        place, node = left.pop()
        found.append(place)
        if len(place) < _MOST_DEPTH:
            keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            left += [((*place, key), node[key]) for key in keys]
    return found


def _node(tree: Any, place: Sequence[Any]) -> Any:
    for key in place:
        tree = tree[key]
    return tree
