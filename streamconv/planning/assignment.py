"""Formats that options assign to modules: that of `--quant`, but for those that a `--quant-for` names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from streamconv.checkpoint.expressions import Expression
from streamconv.dtypes import DENSE
from streamconv.errors import OptionError
from streamconv.formats import FORMATS, with_groups
from streamconv.formats.base import Format, Grouped
from streamconv.formats.linear import matches

NONE = "none"
_GROUPS = ":g"


@dataclass(frozen=True, slots=True)
class FormatRule:
    """Format of the modules that a pattern names, as `formats.linear` reads it; of several rules the last one counts.

    `format` is None where they are stored as without quantization. `has_size`: whether it says how large groups are.
    """

    pattern: str
    format: Format | None
    has_size: bool = False

    def __str__(self) -> str:
        """The rule as it is given and recorded."""
        if self.format is None:
            return f"{self.pattern}={NONE}"
        groups = (
            f"{_GROUPS}{self.format.group_size}" if self.has_size and isinstance(self.format, Grouped) else ""
        )
        return f"{self.pattern}={self.format.name}{groups}"


def is_dense(rule: FormatRule) -> bool:
    """Whether its modules are stored without quantization."""
    return rule.format is None or rule.format.name in DENSE


@dataclass(frozen=True, slots=True)
class ModuleFormats:
    """Formats of single modules: those of `rules`, and of others by what the base calls its own, where they are `kept`.

    `quantizes_rest`: whether modules that no rule names are quantized.
    """

    rules: tuple[FormatRule, ...] = ()
    kept: Mapping[str, Format] = field(default_factory=lambda: MappingProxyType({}))
    quantizes_rest: bool = True

    @property
    def formats(self) -> tuple[Format, ...]:
        """Quantized formats that modules may have by it."""
        of_rules = [rule.format for rule in self.rules if rule.format is not None and not is_dense(rule)]
        return (*self.kept.values(), *of_rules)


def read_rules(given: Mapping[str, str] | Iterable[str]) -> tuple[FormatRule, ...]:
    """Rules as they are given: PATTERN=FORMAT each, or formats by pattern. Raises OptionError for one that is none."""
    if isinstance(given, str):
        given = (given,)
    pairs = given.items() if isinstance(given, Mapping) else map(_split, given)
    rules = [_rule(pattern, name) for pattern, name in pairs]
    for number, rule in enumerate(rules):
        if any(rule.pattern == later.pattern for later in rules[number + 1 :]):
            raise OptionError(f"--quant-for {rule.pattern} stands twice; leave one of them out")
    return tuple(rules)


def rule_for(module: str, rules: Sequence[FormatRule]) -> FormatRule | None:
    """The last rule whose pattern names the module path; None where none does."""
    return next((rule for rule in reversed(rules) if matches(module, (rule.pattern,))), None)


def _split(text: str) -> tuple[str, str]:
    """Pattern and format; a regular expression may have `=` in it, and no format has."""
    pattern, sign, name = text.rpartition("=")
    if not sign or not pattern.strip():
        raise OptionError(
            f"--quant-for {text} must be PATTERN=FORMAT, such as lm_head=w8a16; PATTERN as for --ignore"
        )
    return pattern, name


def _rule(pattern: str, text: str) -> FormatRule:
    name, sign, size = text.lower().partition(_GROUPS)
    if pattern.startswith("re:"):
        Expression(pattern[3:], lambda why: OptionError(f"--quant-for {pattern[:200]} {why}"))
    if name == NONE and not sign:
        return FormatRule(pattern, None)
    if name not in FORMATS:
        raise OptionError(
            f"--quant-for {pattern}={text} is not known; use none, or one of {', '.join(FORMATS)}, with :g64 after it "
            "for groups of 64"
        )
    found = FORMATS[name]
    if not sign:
        return FormatRule(pattern, found)
    sizes = {str(each): each for each in found.group_sizes} if isinstance(found, Grouped) else {}
    if size not in sizes:
        known = f"use {', '.join(f'{name}{_GROUPS}{each}' for each in sizes)}" if sizes else "leave it out"
        raise OptionError(f"--quant-for {pattern}={text}: {name} has no groups of that size; {known}")
    return FormatRule(pattern, with_groups(found, sizes[size]), has_size=True)
