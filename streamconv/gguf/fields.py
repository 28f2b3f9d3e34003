"""Fields of a config.json, read for a GGUF header: each of its type, or the model is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError, UnsupportedError

WAY = (
    "write it in 16 bit (--quant none), and convert that with llama.cpp's convert_hf_to_gguf.py, which may know what to"
    " do"
)
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Fields:
    """Fields of a model's config, or of an object in it that `path` names."""

    where: str
    values: Mapping[str, Any]
    path: str = ""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number that is not negative. Raises CheckpointError where there is none."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
            raise self._wrong(name, "a whole number")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.whole(name, default)
        if not value:
            raise self._wrong(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self._wrong(name, "a number")
        return float(value)

    def numbers(self, name: str) -> list[float]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(
            isinstance(each, int | float) and not isinstance(each, bool) and abs(each) < 1e30
            for each in values
        ):
            raise self._wrong(name, "a list of numbers")
        return [float(each) for each in values]

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def inner(self, name: str) -> Fields | None:
        """An object in it; None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return Fields(self.where, value, f"{self.path}{name}.")

    def refuse(self, name: str, why: str) -> UnsupportedError:
        """The error for a value that llama.cpp has no way to compute."""
        value = shown(self.values.get(name))
        return UnsupportedError(f"{self.where}: config.json has {self.path}{name} {value}, and {why}; {WAY}")

    def _value(self, name: str, default: object) -> object:
        value = self.values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        value = shown(self.values.get(name)) if name in self.values else "none"
        return CheckpointError(
            f"{self.where}: config.json must have {expected} as {self.path}{name} for a GGUF file, found {value}; give"
            " the config that belongs to the weights"
        )
