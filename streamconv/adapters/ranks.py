"""Rank and alpha of a module, as `r`, `rank_pattern`, alpha and `alpha_pattern` of a config give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.patterns import Number, Patterns
from streamconv.checkpoint.expressions import Expression
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank and alpha by module: the first pattern that matches wins; `name` is what messages call the config."""

    name: str
    r: int
    alpha: float
    rank_pattern: Patterns[int] | None
    alpha_pattern: Patterns[float] | None

    def rank(self, module: str) -> int:
        return self.r if self.rank_pattern is None else self.rank_pattern.find(module, self.r)

    def alpha_of(self, module: str) -> float:
        return self.alpha if self.alpha_pattern is None else self.alpha_pattern.find(module, self.alpha)

    def check_rank(self, module: str, tensor: StoredTensor, rank: int) -> None:
        """Raise AdapterError unless `rank`, that of `tensor`, is the one the config gives `module`."""
        expected = self.rank(module)
        if rank != expected:
            raise AdapterError(
                f"{tensor.name} has rank {rank}, but {self.name} gives {module} the rank {expected} (r and"
                " rank_pattern); config and tensors are not of one adapter"
            )


def read_ranks(config: AdapterConfig, alpha: str) -> Ranks:
    """Ranks of a config whose alpha is the field `alpha`. Raises AdapterError for a field of a wrong type."""
    return Ranks(
        name=config.name,
        r=config.rank("r"),
        alpha=config.number(alpha),
        rank_pattern=rank_patterns(config),
        alpha_pattern=alpha_patterns(config),
    )


def rank_patterns(config: AdapterConfig) -> Patterns[int] | None:
    entries = tuple(config.ranks("rank_pattern").items())
    return _patterns(config, "rank_pattern", entries) if entries else None


def alpha_patterns(config: AdapterConfig) -> Patterns[float] | None:
    entries = tuple(config.numbers("alpha_pattern").items())
    return _patterns(config, "alpha_pattern", entries) if entries else None


def _patterns(config: AdapterConfig, field: str, entries: Sequence[tuple[str, Number]]) -> Patterns[Number]:
    return Patterns(
        entries,
        lambda text: module_pattern(config, field, text),
        lambda why: AdapterError(f"{config.name}: {field} {why}"),
    )


def module_pattern(config: AdapterConfig, field: str, text: str) -> Expression:
    """`get_pattern_key` of `peft/utils/other.py`: a pattern may leave out the top of a module's path."""
    return expression_of(config, field, text, rf"(.*\.)?({text})$")


def expression_of(config: AdapterConfig, field: str, text: str, pattern: str) -> Expression:
    """The regular expression `pattern`, which is made of `text` in the config's `field`.

    It raises AdapterError, also when it is matched.
    """
    return Expression(pattern, lambda why: AdapterError(f"{config.name}: {shown(text)} in {field} {why}"))


@dataclass(frozen=True, slots=True)
class OwnPatterns:
    """Numbers that a field of a method's own gives modules, by pattern; `whole` are those of whole paths.

    As PEFT's methods with such a field look them up (`_create_and_replace` in their models): a pattern stands below at
    least one name of the path, and only the whole path may leave that out.
    """

    patterns: Patterns[int]
    whole: Mapping[str, int]

    def of(self, module: str, default: int) -> int:
        return self.patterns.find(module, self.whole.get(module, default))


def own_patterns(config: AdapterConfig, field: str) -> OwnPatterns:
    """Numbers of `field`. Raises AdapterError for one of a wrong type."""
    entries = config.ranks(field)

    def expression(text: str) -> Expression:
        return expression_of(config, field, text, rf".*\.{text}$")

    def refuse(why: str) -> AdapterError:
        return AdapterError(f"{config.name}: {field} {why}")

    return OwnPatterns(Patterns(tuple(entries.items()), expression, refuse, is_below=True), entries)
