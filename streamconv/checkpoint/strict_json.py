"""JSON as the checkpoint files may use it, where Python's own parser is too lenient for a stranger's file.

Python's `json` takes NaN, keeps the last of repeated keys, lets lone surrogates through, and answers deep
nesting and integers of thousands of digits with RecursionError and ValueError. Here all are bad input, and so is
nesting that the parser takes and `copy.deepcopy` does not.
"""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.errors import CheckpointError

_MAX_DEPTH = 100  # tokenizer.json, the deepest that is known, has 8
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def parse_object(raw: bytes, where: str, allow_nonfinite: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`, keys in file order; `where` names the file in messages.

    `allow_nonfinite` lets `Infinity` and `NaN` pass: transformers wrote them to config.json for years
    (Mamba2's `time_step_limit`). Raises CheckpointError.
    """
    if raw.startswith(codecs.BOM_UTF8):
        raise CheckpointError(
            f"{where} is not valid JSON: it begins with a byte order mark, which editors of Windows write; save it as"
            " UTF-8 without one"
        )
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=float if allow_nonfinite else _refuse_constant,
        )
        if b"\\u" in raw:  # "\ud800" alone is a str that no file or terminal can take
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{where} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:300]}") from error
    if _is_deep(raw, value):
        raise CheckpointError(f"{where} is not valid JSON: nested too deeply")
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, found {shown(value)}")
    return value


def _is_deep(raw: bytes, value: object) -> bool:
    """Whether containers are nested in more than `_MAX_DEPTH` levels, each of which needs a bracket of its own."""
    if raw.count(b"{") + raw.count(b"[") <= _MAX_DEPTH:
        return False
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inside for each in values if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def shown(value: object) -> str:
    """`value` as it may stand in a message: quoted, and short however long it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _without_repeats(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        seen.add(key)
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are: for messages."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
