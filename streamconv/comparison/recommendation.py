"""Recommendation of a strategy, by a rule that can be said in a sentence.

Of the written models that fit, the best is the one with the lowest KL to the reference. As good are those whose KL and
whose perplexity are not higher than its own beyond the 95 % interval (paired bootstrap over sequences: the interval of
the difference reaches 0). Of these the smallest is taken; of those no more than 1 % larger than that, the one that
loads in the least memory; where that is not known or the same, the one with the lowest KL.

Codes that are chosen for a residual adapter are worse than others without it, and where adapters can be loaded T need
not be merged at all: they are recommended apart from models that stand for themselves.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from streamconv.comparison.bootstrap import difference, perplexity_difference
from streamconv.comparison.result import Advice, Numbers, Row
from streamconv.comparison.strategies import T
from streamconv.formats import FORMATS

# Sizes that differ by less are the same: headers, padding, a few tensors left in 16 bit.
_SAME_SIZE = 1.01
# Nats a token: of a model against itself, but for rounding in the sums.
_NO_KL = 1e-6
_RESIDUAL = "--residual-rank"
_WIDTHS = {4: "4-bit codes", 8: "8-bit codes", 16: "16 bit"}

Written = tuple[Row, Numbers]


def recommend(rows: Sequence[Row], max_bits: float | None) -> tuple[Advice, ...]:
    """One recommendation for models of at most `max_bits` a weight, by tensor bytes; without a limit, one for each
    width of codes. Each once more for those with an adapter beside them, if there are any.
    """
    written = [(row, row.numbers) for row in rows if row.numbers is not None and row.command is not None]
    if max_bits is not None:
        need = f"at most {max_bits:g} bits a weight"
        fitting = [(row, found) for row, found in written if found.bits_per_weight <= max_bits]
        small = [row for row in rows if row.numbers is not None and row.numbers.bits_per_weight <= max_bits]
        return (_advice(need, _alone(fitting)), *_with_adapter(need, fitting, small))
    found_advice: list[Advice] = []
    for width, words in _WIDTHS.items():
        fitting = [(row, found) for row, found in written if width_of(row) == width]
        found_advice += [_advice(words, _alone(fitting))] if _alone(fitting) else []
        found_advice += _with_adapter(words, fitting, rows)
    return tuple(found_advice)


def has_adapter(row: Row) -> bool:
    """Whether a residual adapter is part of the output."""
    words = shlex.split(row.command or "")
    return _RESIDUAL in words[:-1] and words[words.index(_RESIDUAL) + 1] != "0"


def _alone(fitting: Sequence[Written]) -> Sequence[Written]:
    return [(row, found) for row, found in fitting if not has_adapter(row)]


def _with_adapter(need: str, fitting: Sequence[Written], rows: Sequence[Row]) -> Sequence[Advice]:
    """Recommend one of those with an adapter, nothing where there are none; and that T, unmerged, is nearer still where
    that is among `rows` and is the reference.
    """
    beside = [(row, found) for row, found in fitting if has_adapter(row)]
    if not beside:
        return ()
    advice = _advice(f"{need} and an adapter", beside)
    exact = [row.name for row in rows if _is_exact(row)]
    if not exact or advice.name not in [row.name for row, _ in beside if row.target == T]:
        return (advice,)
    reason = f"{advice.reason}; {exact[0]} is exact: where adapters can be loaded, do not merge"
    return (replace(advice, reason=reason),)


def _is_exact(row: Row) -> bool:
    """Whether this is T, unmerged, and what all were compared with."""
    is_unmerged = row.command is None and row.target == T
    return is_unmerged and row.numbers is not None and row.numbers.kl.value < _NO_KL


def width_of(row: Row) -> int:
    """Bits of a code of its format, without scales: 4, 8 or 16."""
    if row.quant is None or row.quant not in FORMATS or FORMATS[row.quant].grid is None:
        return 16
    return 4 if FORMATS[row.quant].bits_per_weight < 6 else 8


def _advice(need: str, fitting: Sequence[Written]) -> Advice:
    if not fitting:
        return Advice(need, None, (), "no strategy that was compared comes to that")
    _, best = min(fitting, key=lambda pair: pair[1].kl.value)
    good = [(row, found) for row, found in fitting if _is_as_good(found, best)]
    smallest = min(found.size_bytes for _, found in good)
    small = [(row, found) for row, found in good if found.size_bytes <= _SAME_SIZE * smallest]
    chosen, numbers = min(small, key=lambda pair: (_load_bytes(pair[1]), pair[1].kl.value))
    others = tuple(row.name for row, _ in good)
    return Advice(need, chosen.name, others, _reason(numbers, best, len(fitting), len(good), len(small)))


def _is_as_good(found: Numbers, best: Numbers) -> bool:
    """Whether neither KL nor perplexity is higher than the best's beyond chance."""
    if found is best:
        return True
    kl = difference(found.kl_by_sequence, best.kl_by_sequence)
    perplexity = perplexity_difference(found.losses, best.losses)
    return kl.low <= 0 and perplexity.low <= 0


def _load_bytes(found: Numbers) -> float:
    """Bytes that loading takes; those of whom that is not known come last."""
    peak = found.speed.load_peak_bytes if found.speed else None
    return float("inf") if peak is None else peak


def _reason(chosen: Numbers, best: Numbers, fitting: int, good: int, small: int) -> str:
    kl = f"KL {chosen.kl.value:.2g}, perplexity {chosen.perplexity:.2f}"
    if fitting == 1:
        return f"the only one that was compared; {kl}"
    if good == 1:
        return f"the lowest KL of {fitting}, and none of the others is as good within the 95 % interval; {kl}"
    among = f"{good} of {fitting} cannot be told from the best within the 95 % interval"
    if small == 1:
        return f"{among}; this is the smallest of them; {kl}"
    if chosen is best:
        return f"{among}; of the smallest of them it has the lowest KL, or loads in the least memory; {kl}"
    return f"{among}; of the smallest of them it loads in the least memory; {kl}"
