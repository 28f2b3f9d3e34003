"""Regular expressions from files, matched in bounded time and memory.

Python's `re` tries one way after the other, and a pattern of a dozen characters can give it more ways than it ever
ends; nothing can stop it. So `re` gets only expressions that leave it few. All others are matched here, by sets: of
each part of the expression, all positions of the text are found at once from which it leads to a set of positions after
it. That says whether there is a match, as `re` would, in a time that grows with the text and not with the ways.

A library that stops after a time (`regex`) would refuse on a busy machine what an idle one merges, and one that never
takes long (RE2) has no lookarounds, which adapters of vision models use.

A set of positions is an integer: bit i stands for the place before character i.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any, Protocol

from streamconv.errors import StreamconvError

# The parser of `re` has no public name; that of sre_parse is on its way out.
_PARSER: Any = import_module("re._parser")
_COMPILER: Any = import_module("re._compiler")

_MAX_LENGTH = 2**16
_MAX_NESTING = 100
_MAX_TEXT = 10_000
# In sets that ignore case, `re` goes through every character one by one.
_MAX_SETS = 30
_IGNORES_CASE = re.compile(r"\(\?[aLmsux]*i")
# Ways that are left to `re`: a third of a millisecond for each text, at worst.
_FEW_WAYS = 2**15
_FEW_REPEATS = 8
# Steps that all texts may take together, and those that each adds: a second or two, and what honest ones need twice.
_STEPS, _STEPS_PER_TEXT = 2**21, 1000
_MOST_KEPT = 2**17


class Refused(Exception):  # noqa: N818  never seen by users: `refuse` says which field it is about
    """Reason for which an expression cannot be used."""


class Expression:
    """A regular expression; `refuse` makes the error of a sentence's end on why it cannot be used.

    Raises that error for one that `re` would not take, or that is too large; and when a match takes too long.
    """

    def __init__(self, pattern: str, refuse: Callable[[str], StreamconvError]) -> None:
        self._refuse = refuse
        try:
            self._program = _program(pattern)
        except Refused as error:
            raise refuse(str(error)) from error

    def fits(self, text: str) -> bool:
        """Whether `text` begins with a match, as `re.match` has it."""
        return self._is_found(text, is_whole=False)

    def fits_all_of(self, text: str) -> bool:
        """Whether all of `text` is a match, as `re.fullmatch` has it."""
        return self._is_found(text, is_whole=True)

    def group(self, name: str, text: str) -> str | None:
        """Text of a group in what `re.match` finds; None without a match.

        Raises the error for an expression that is not left to `re`, too: sets do not tell which way was first.
        """
        quick = self._program.quick(text)
        if quick is None:
            raise self._refuse(
                "is too involved a regular expression for this field; write it without nested repeats"
            )
        found = quick.match(text)
        return None if found is None else found[name]

    def _is_found(self, text: str, *, is_whole: bool) -> bool:
        try:
            return self._program.is_found(text, is_whole)
        except Refused as error:
            raise self._refuse(str(error)) from error


# -- parts of an expression ----------------------------------------------------------------------------------------


class _Text:
    """A text that is matched: where each character stands, and what was found of it so far."""

    def __init__(self, text: str, steps: int) -> None:
        self.text = text
        self.steps = steps
        self.everywhere = (1 << len(text) + 1) - 1
        self.at: dict[str, int] = {}
        for i, char in enumerate(text):
            self.at[char] = self.at.get(char, 0) | 1 << i
        self.found: dict[int, int] = {}

    def charge(self, steps: int = 1) -> None:
        """Count steps. Raises Refused when none are left."""
        self.steps -= steps
        if self.steps < 0:
            raise Refused(
                "is a regular expression that takes too long to match; write it without repeats inside repeats"
            )


class _Part(Protocol):
    def starts(self, text: _Text, ends: int) -> int:
        """Positions from which the part leads to one of `ends`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Char:
    """One character: of those that `pattern`, an expression for one, takes."""

    pattern: re.Pattern[str]

    def starts(self, text: _Text, ends: int) -> int:
        text.charge()
        return ends >> 1 & self.places(text)

    def places(self, text: _Text) -> int:
        if id(self) not in text.found:
            fitting = (places for char, places in text.at.items() if self.pattern.match(char))
            text.found[id(self)] = sum(fitting)
        return text.found[id(self)]


@dataclass(frozen=True, slots=True, eq=False)
class _Literal:
    """One character, this one."""

    char: str

    def starts(self, text: _Text, ends: int) -> int:
        text.charge()
        return ends >> 1 & text.at.get(self.char, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    r"""A place that `pattern`, an expression without length such as `\b`, takes."""

    pattern: re.Pattern[str]

    def starts(self, text: _Text, ends: int) -> int:
        text.charge()
        if id(self) not in text.found:
            places = range(len(text.text) + 1)
            text.found[id(self)] = sum(1 << i for i in places if self.pattern.match(text.text, i))
        return ends & text.found[id(self)]


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One part after the other."""

    parts: tuple[_Part, ...]

    def starts(self, text: _Text, ends: int) -> int:
        for part in reversed(self.parts):
            if not ends:
                break
            ends = part.starts(text, ends)
        return ends


@dataclass(frozen=True, slots=True, eq=False)
class _Either:
    """One of several parts."""

    parts: tuple[_Part, ...]

    def starts(self, text: _Text, ends: int) -> int:
        text.charge()
        found = 0
        for part in self.parts:
            found |= part.starts(text, ends)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Any number of characters that `char` takes."""

    char: _Char

    def starts(self, text: _Text, ends: int) -> int:
        runs, length = self.char.places(text), 1
        while runs and length <= len(text.text):  # runs of 1, 2, 4, ... characters at once
            text.charge()
            ends |= ends >> length & runs
            runs &= runs >> length
            length *= 2
        return ends


@dataclass(frozen=True, slots=True, eq=False)
class _Repeat:
    """A part again and again: up to `most` times, None for any number."""

    part: _Part
    most: int | None

    def starts(self, text: _Text, ends: int) -> int:
        new = found = ends
        left = -1 if self.most is None else self.most
        while new and left:
            text.charge()
            new = self.part.starts(text, new) & ~found
            found |= new
            left -= 1
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Times:
    """A part `count` times."""

    part: _Part
    count: int

    def starts(self, text: _Text, ends: int) -> int:
        for _ in range(self.count):
            text.charge()
            before, ends = ends, self.part.starts(text, ends)
            if ends in (before, 0):
                break
        return ends


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """A part that must, or must not, be found ahead, or, with its `width`, behind."""

    part: _Part
    is_wanted: bool
    width: int = 0

    def starts(self, text: _Text, ends: int) -> int:
        text.charge()
        if id(self) not in text.found:  # the same wherever it leads
            text.found[id(self)] = self.part.starts(text, text.everywhere) << self.width
        found = text.found[id(self)]
        return ends & found if self.is_wanted else ends & ~found


# -- from the tree of `re` -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ways:
    """Bound of the ways in which something may match: `number` times the length of the text to the power `degree`."""

    number: int = 1
    degree: int = 0

    def times(self, other: _Ways) -> _Ways:
        return _Ways(min(self.number * other.number, _FEW_WAYS), self.degree + other.degree)

    def plus(self, other: _Ways) -> _Ways:
        return _Ways(min(self.number + other.number, _FEW_WAYS), max(self.degree, other.degree))

    def repeated(self, least: int, most: int, is_empty: bool) -> _Ways:
        """Ways of so many repeats; `is_empty`: of what may be nothing, which the text's length does not bound."""
        if self == _Ways() and not is_empty:
            return _Ways(degree=1) if most == _PARSER.MAXREPEAT else _Ways(min(most - least + 1, _FEW_WAYS))
        if most > _FEW_REPEATS:
            return _ANY
        found = _Ways()
        for _ in range(most):
            found = found.times(self.plus(_Ways()))
        return found

    def are_few(self, text: str) -> bool:
        return self.degree <= 2 and self.number * max(len(text), 1) ** self.degree < _FEW_WAYS


_ANY = _Ways(degree=100)


def _ways(tree: Any) -> _Ways:
    """Ways of a sequence."""
    found = _Ways()
    for code, value in tree:
        if code is _PARSER.LITERAL:
            continue
        match str(code):
            case "BRANCH":
                each = _Ways(0)
                for one in value[1]:
                    each = each.plus(_ways(one))
            case "SUBPATTERN":
                each = _ways(value[3])
            case "ASSERT" | "ASSERT_NOT":
                each = _ways(value[1])
            case "ATOMIC_GROUP":
                each = _ways(value)
            case "GROUPREF_EXISTS":
                each = _ways(value[1]).plus(_ways(value[2] or ()))
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, body = value
                each = _ways(body).repeated(least, most, is_empty=not body.getwidth()[0])
            case _:
                continue
        found = found.times(each)
    return found


def _row(tree: Any, flags: int) -> _Part:
    parts = tuple(_part(code, value, flags) for code, value in tree)
    return parts[0] if len(parts) == 1 else _Row(parts)


def _part(code: Any, value: Any, flags: int) -> _Part:
    """The part for one node. Raises Refused for one that sets cannot match."""
    found: _Part
    match str(code):
        case "LITERAL" if not flags & re.IGNORECASE:
            found = _Literal(chr(value))
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
            found = _Char(_alone(code, value, flags))
        case "AT":
            found = _Place(_alone(code, value, flags))
        case "FAILURE":
            found = _Either(())
        case "BRANCH":
            found = _Either(tuple(_row(each, flags) for each in value[1]))
        case "SUBPATTERN":
            found = _row(value[3], (flags | value[1]) & ~value[2])
        case "ASSERT" | "ASSERT_NOT":
            found = _look(str(code) == "ASSERT", value[0], value[1], flags)
        case "MAX_REPEAT" | "MIN_REPEAT":
            least, most, tree = value
            found = _repeat(least, None if most == _PARSER.MAXREPEAT else most - least, _row(tree, flags))
        case _:
            raise Refused(
                "is a regular expression that may take for ever and cannot be matched another way, for its "
                "back-references or possessive repeats; write it without"
            )
    return found


def _repeat(least: int, further: int | None, part: _Part) -> _Part:
    up_to = _Run(part) if further is None and isinstance(part, _Char) else _Repeat(part, further)
    return _Row((_Times(part, least), up_to)) if least else up_to


def _look(is_wanted: bool, direction: int, tree: Any, flags: int) -> _Part:
    if direction > 0:
        return _Look(_row(tree, flags), is_wanted)
    least, most = tree.getwidth()
    if least != most:
        raise Refused("is not a regular expression: look-behind requires fixed-width pattern")
    return _Look(_row(tree, flags), is_wanted, least)


def _alone(code: Any, value: Any, flags: int) -> re.Pattern[str]:
    """The expression that is one node without parts, which no text can give more ways than one."""
    state = _PARSER.State()
    state.flags = flags
    found: re.Pattern[str] = _COMPILER.compile(_PARSER.SubPattern(state, [(code, value)]), flags)
    return found


# -- both ways -----------------------------------------------------------------------------------------------------


class _Program:
    """An expression in both forms, and the steps that it has left."""

    def __init__(self, pattern: str) -> None:
        tree = _tree(pattern)
        self._ways = _ways(tree)
        self._quick = _compiled(tree) if self._ways.are_few("") else None
        self._slow = None if self._quick else _row(tree, tree.state.flags)
        self._tree = tree
        self._steps = _STEPS
        self._matched: dict[tuple[str, bool], bool] = {}  # a text that comes again costs no steps again

    def quick(self, text: str) -> re.Pattern[str] | None:
        """The expression for `re`, if it has few ways to match `text`."""
        return self._quick if self._ways.are_few(text) else None

    def is_found(self, text: str, is_whole: bool) -> bool:
        quick = self.quick(text)
        if quick is not None:
            return (quick.fullmatch(text) if is_whole else quick.match(text)) is not None
        if len(text) > _MAX_TEXT:
            raise Refused(
                f"is to be matched with a name of {len(text)} characters, and no module has such a name"
            )
        if (text, is_whole) in self._matched:
            return self._matched[text, is_whole]
        if self._slow is None:
            self._slow = _row(self._tree, self._tree.state.flags)
        known = _Text(text, self._steps + _STEPS_PER_TEXT)
        ends = 1 << len(text) if is_whole else known.everywhere
        found = self._slow.starts(known, ends) & 1
        self._steps = known.steps
        if len(self._matched) < _MOST_KEPT:
            self._matched[text, is_whole] = bool(found)
        return bool(found)


@lru_cache(maxsize=2**14)
def _program(pattern: str) -> _Program:
    return _Program(pattern)


def _tree(pattern: str) -> Any:
    """Parsed by `re` itself. Raises Refused with what it says, or for an expression that is too large to parse."""
    if len(pattern) > _MAX_LENGTH:
        raise Refused(f"is a regular expression of {len(pattern)} characters, and {_MAX_LENGTH} are the most")
    if pattern.count("(") > _MAX_NESTING and _nesting(pattern) > _MAX_NESTING:
        raise Refused(f"is a regular expression with more than {_MAX_NESTING} brackets inside each other")
    if pattern.count("[") > _MAX_SETS and _IGNORES_CASE.search(pattern):
        raise Refused(
            f"is a regular expression that ignores case in more than {_MAX_SETS} sets of characters"
        )
    try:
        with warnings.catch_warnings():  # on forms that later versions of Python may read otherwise
            warnings.simplefilter("ignore")
            return _PARSER.parse(pattern)
    except (re.error, OverflowError, ValueError) as error:
        raise Refused(f"is not a regular expression: {str(error)[:200]}") from error


def _compiled(tree: Any) -> re.Pattern[str]:
    try:
        found: re.Pattern[str] = _COMPILER.compile(tree)
    except re.error as error:  # for look-behind alone
        raise Refused(f"is not a regular expression: {error}") from error
    return found


def _nesting(pattern: str) -> int:
    """Most brackets inside each other, or more where some are escaped."""
    return max(accumulate({"(": 1, ")": -1}.get(char, 0) for char in pattern))
