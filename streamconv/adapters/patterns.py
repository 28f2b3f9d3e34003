"""Numbers by pattern of a module's name, the first that fits wins: as many as one for each expert of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from streamconv.checkpoint.expressions import Expression

Number = TypeVar("Number", int, float)

# A plain name; its dots fit any character, as in every regular expression.
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_MOST_TRIALS, _OF_EXPRESSION = 20_000_000, 10


class Patterns(Generic[Number]):
    """Patterns in their order, each of which may leave out the top of a module's path; where `is_below`, has to.

    Plain names are looked up: those of one length with dots at the same places differ in their other letters alone. So
    only regular expressions are tried one by one.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, Number]],
        expression: Callable[[str], Expression],
        refuse: Callable[[str], Exception],
        *,
        is_below: bool = False,
    ) -> None:
        """`expression` makes one of a pattern; `refuse` makes the error of a sentence's end if there are too many."""
        self._values: list[Number] = [value for _, value in entries]
        self._refuse, self._trials = refuse, 0
        self._is_below = is_below
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[tuple[int, Expression]] = []
        for place, (text, _) in enumerate(entries):
            if _PLAIN.fullmatch(text):
                dots = tuple(i for i, letter in enumerate(text) if letter == ".")
                self._plain.setdefault((len(text), dots), {}).setdefault(text, place)
            else:
                self._others.append((place, expression(text)))

    def find(self, module: str, default: Number) -> Number:
        """The number of the first pattern that fits a module, else `default`. Raises the error of `refuse`."""
        first = self._first_plain(module)
        for place, expression in self._others:
            if place > first:
                break
            self._count(_OF_EXPRESSION)
            if expression.fits(module):
                first = place
                break
        return self._values[first] if first < len(self._values) else default

    def _first_plain(self, module: str) -> int:
        """Place of the first plain name that fits; one behind the last where none does."""
        self._count(len(self._plain))
        first = len(self._values)
        for (length, dots), names in self._plain.items():
            end = module[-length:]
            if len(end) < length or not self._is_end(module, length):
                continue
            letters = list(end)
            for dot in dots:
                letters[dot] = "."
            first = min(first, names.get("".join(letters), first))
        return first

    def _is_end(self, module: str, length: int) -> bool:
        """Whether the last characters of a module's path, so many, are whole names of it."""
        return not self._is_below if len(module) == length else module[-length - 1] == "."

    def _count(self, trials: int) -> None:
        self._trials += trials
        if self._trials > _MOST_TRIALS:
            raise self._refuse(
                f"has {len(self._values)} patterns, which are too many to try with all modules; write plain names, or"
                " fewer patterns that fit more"
            )
