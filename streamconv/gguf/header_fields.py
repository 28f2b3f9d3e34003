"""Pairs of a GGUF header, read for a config.json: each of its type, or the model is refused by the name of its key."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamconv.checkpoint.gguf import Value
from streamconv.checkpoint.strict_json import shown, some
from streamconv.errors import CheckpointError, UnsupportedError

BESIDE = (
    "put the config.json of the original model beside the file (and its tokenizer's files), which are then read in"
    " place of the header"
)
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class HeaderFields:
    """Pairs of one file; keys are those of its architecture, without its name. `seen` are keys that were asked for."""

    where: str
    architecture: str
    pairs: Mapping[str, Value]
    seen: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        return self._key(key) in self.pairs

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, or `default` where the key is missing. Raises CheckpointError."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            raise self._wrong(key, "a whole number above 0")
        return value

    def window(self, key: str) -> int:
        """A whole number that may be 0, for none. Raises CheckpointError."""
        return 0 if self._value(key, None) == 0 else self.whole(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A number as it is written in decimals, shortest: 1e-05 for the float32 nearest to it."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self._wrong(key, "a number")
        return shortest(value)

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def skip(self, *keys: str) -> None:
        """Take keys that say nothing of how the model computes."""
        self.seen.update(map(self._key, keys))

    def check_all_seen(self) -> None:
        """Raise UnsupportedError for a key of the architecture that nothing has asked for: it may change the model."""
        left = sorted(
            key for key in self.pairs if key.startswith(f"{self.architecture}.") and key not in self.seen
        )
        if left:
            raise UnsupportedError(
                f"{self.where}: its header has {some(left)}, for which no field of config.json is known; {BESIDE}"
            )

    def refuse(self, key: str, why: str) -> UnsupportedError:
        """The error for a value that no config.json says."""
        value = shown(self.pairs.get(self._key(key)))
        return UnsupportedError(f"{self.where}: its header has {self._key(key)} {value}, and {why}; {BESIDE}")

    def _key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _value(self, key: str, default: object) -> object:
        self.seen.add(self._key(key))
        return self.pairs.get(self._key(key), default)

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        name = self._key(key)
        found = shown(self.pairs[name]) if name in self.pairs else "none"
        return CheckpointError(
            f"{self.where}: its header must have {expected} as {name}, found {found}; download it again, or {BESIDE}"
        )


def shortest(value: float) -> float:
    """The decimal of fewest digits that is rounded to the same float32; a number that is none stays."""
    try:
        stored = struct.pack("<f", value)
        for digits in range(1, 10):
            found = float(f"{value:.{digits}g}")
            if struct.pack("<f", found) == stored:
                return found
    except OverflowError:
        pass
    return value
