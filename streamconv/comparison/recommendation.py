"""Which strategy to take, by a rule that can be said in a sentence.

Of the written models that fit, the best is the one with the lowest KL to the reference. As good are those whose KL and
whose perplexity are not higher than its own beyond the 95 % interval (paired bootstrap over sequences: the interval of
the difference reaches 0). Of these the smallest is taken; of those no more than 1 % larger than that, the one that
loads in the least memory; where that is not known or the same, the one with the lowest KL.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.comparison.bootstrap import difference, perplexity_difference
from streamconv.comparison.result import Advice, Numbers, Row
from streamconv.formats import FORMATS

# Sizes that differ by less are the same: headers, padding, a few tensors left in 16 bit.
_SAME_SIZE = 1.01
_WIDTHS = {4: "4-bit codes", 8: "8-bit codes", 16: "16 bit"}


def recommend(rows: Sequence[Row], max_bits: float | None) -> tuple[Advice, ...]:
    """One recommendation for models of at most `max_bits` a weight, by tensor bytes; without a limit, one for each
    width of codes.
    """
    written = [(row, row.numbers) for row in rows if row.numbers is not None and row.command is not None]
    if max_bits is not None:
        return (
            _advice(
                f"at most {max_bits:g} bits a weight",
                [(row, found) for row, found in written if found.bits_per_weight <= max_bits],
            ),
        )
    return tuple(
        _advice(words, fitting)
        for width, words in _WIDTHS.items()
        if (fitting := [(row, found) for row, found in written if width_of(row) == width])
    )


def width_of(row: Row) -> int:
    """Of the codes of its format, without scales: 4, 8 or 16."""
    if row.quant is None or row.quant not in FORMATS or FORMATS[row.quant].grid is None:
        return 16
    return 4 if FORMATS[row.quant].bits_per_weight < 6 else 8


def _advice(need: str, fitting: Sequence[tuple[Row, Numbers]]) -> Advice:
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
    """What loading takes; those of whom that is not known come last."""
    peak = found.speed.load_peak_bytes if found.speed else None
    return float("inf") if peak is None else peak


def _reason(chosen: Numbers, best: Numbers, fitting: int, good: int, small: int) -> str:
    kl = f"KL {chosen.kl.value:.2g}, perplexity {chosen.perplexity:.2f}"
    if fitting == 1:
        return f"the only one of that size; {kl}"
    if good == 1:
        return f"the lowest KL of {fitting}, and none of the others is as good within the 95 % interval; {kl}"
    among = f"{good} of {fitting} cannot be told from the best within the 95 % interval"
    if small == 1:
        return f"{among}; this is the smallest of them; {kl}"
    if chosen is best:
        return f"{among}; of the smallest of them it has the lowest KL, or loads in the least memory; {kl}"
    return f"{among}; of the smallest of them it loads in the least memory; {kl}"
