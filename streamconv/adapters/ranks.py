"""Rank and alpha of a module, as `r`, `rank_pattern`, alpha and `alpha_pattern` of a config give them."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.adapters.config import AdapterConfig
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
    rank_pattern: tuple[tuple[Expression, int], ...]
    alpha_pattern: tuple[tuple[Expression, float], ...]

    def rank(self, module: str) -> int:
        return next((rank for pattern, rank in self.rank_pattern if pattern.fits(module)), self.r)

    def alpha_of(self, module: str) -> float:
        return next((alpha for pattern, alpha in self.alpha_pattern if pattern.fits(module)), self.alpha)

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


def rank_patterns(config: AdapterConfig) -> tuple[tuple[Expression, int], ...]:
    entries = config.ranks("rank_pattern").items()
    return tuple((module_pattern(config, "rank_pattern", text), rank) for text, rank in entries)


def alpha_patterns(config: AdapterConfig) -> tuple[tuple[Expression, float], ...]:
    entries = config.numbers("alpha_pattern").items()
    return tuple((module_pattern(config, "alpha_pattern", text), alpha) for text, alpha in entries)


def module_pattern(config: AdapterConfig, field: str, text: str) -> Expression:
    """`get_pattern_key` of `peft/utils/other.py`: a pattern may leave out the top of a module's path."""
    return expression_of(config, field, text, rf"(.*\.)?({text})$")


def expression_of(config: AdapterConfig, field: str, text: str, pattern: str) -> Expression:
    """The regular expression `pattern`, which is made of `text` in the config's `field`.

    It raises AdapterError, also when it is matched.
    """
    return Expression(pattern, lambda why: AdapterError(f"{config.name}: {shown(text)} in {field} {why}"))


def by_pattern(config: AdapterConfig, field: str, module: str, default: int) -> int:
    """The number that `field`, an object by pattern, gives `module`, else `default`.

    As PEFT's methods with a pattern of their own look it up (`_create_and_replace` in their models): a pattern stands
    below at least one name of the path, and only the whole path may leave that out.
    """
    entries = config.ranks(field)
    for text, number in entries.items():
        if expression_of(config, field, text, rf".*\.{text}$").fits(module):
            return number
    return entries.get(module, default)
