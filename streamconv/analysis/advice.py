"""Advice drawn from the numbers of an analysis, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streamconv.analysis.result import OnGrid, TargetAnalysis
from streamconv.planning.plan import Choice
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.adaptive import Adaptive

# A result that keeps less than this has lost the update; one that keeps more than the other has it.
_LOST, _KEPT = 0.2, 0.8


def advise(
    total: Mapping[str, TargetAnalysis], auto: Mapping[tuple[str, str], Choice], merge_base: str | None
) -> tuple[str, ...]:
    """A few sentences, the last of them the recommendation. `merge_base` is the option that names target T's base."""
    return tuple(_sentences(total, auto, merge_base))


def _sentences(
    total: Mapping[str, TargetAnalysis], auto: Mapping[tuple[str, str], Choice], merge_base: str | None
) -> Iterator[str]:
    lines = [
        _dead_zone(name, on_grid)
        for name, on_grid in (total["T"].formats.items() if "T" in total else ())
        if on_grid.predicted_kept is not None
    ]
    yield from lines[:1]  # with and without double quantization, the grid is the same
    if "F" in total and "T" in total and total["T"].base_error_to_delta is not None:
        yield _distance(total["T"].base_error_to_delta)
    yield from (_choice(name, total, auto, merge_base) for name in _formats(total))


def _formats(total: Mapping[str, TargetAnalysis]) -> Iterator[str]:
    """The first format: what is said of it holds for its like."""
    yield from list(next(iter(total.values())).formats)[:1]


def _dead_zone(name: str, found: OnGrid) -> str:
    kept = found.roundings["nearest"].kept
    verdict = (
        "erases the update"
        if kept < _LOST
        else "keeps the update"
        if kept > _KEPT
        else "loses part of the update"
    )
    return (
        f"the update is {found.delta_to_step:.2g} of a step of the {name} grid on average: nearest rounding of T keeps "
        f"{kept:.0%} of it (predicted {found.predicted_kept:.0%}), it {verdict}"
    )


def _distance(ratio: float) -> str:
    return (
        f"F is {ratio:.1f} times the update away from T, which training saw (||W - Wq|| / ||D||): "
        "`streamconv eval` tells which of them is better here"
    )


def _choice(
    name: str,
    total: Mapping[str, TargetAnalysis],
    auto: Mapping[tuple[str, str], Choice],
    merge_base: str | None,
) -> str:
    target = "F" if "F" in total else "T"
    way, words = _way(auto[target, name], total[target].formats[name])
    found = total[target].formats[name].roundings.get(way)
    kept = (
        f", which keeps {found.kept:.0%} of the update with an error of {found.error:.1f} times it"
        if found
        else ""
    )
    other = ""
    if target == "F" and "T" in total and merge_base is not None:
        way, of_trained = _way(auto["T", name], total["T"].formats[name])
        stored = total["T"].formats[name].roundings.get(way)
        share = f" and keeps {stored.kept:.0%}" if stored else ""
        other = f"; --merge-base {merge_base} starts from what training saw, takes {of_trained}{share}"
    return f"--quant {name} takes {words} rounding of {target}{kept}{other}"


def _way(chosen: Choice, found: OnGrid) -> tuple[str, str]:
    """The rounding that weights of this ratio get, and what is chosen in words."""
    rounding = ROUNDINGS[chosen.name]
    if not isinstance(rounding, Adaptive):
        return chosen.name, chosen.name
    way = rounding.settled(None if found.predicted_kept is None else found.delta_to_step).name
    return way, f"{chosen.name} (here {way})"
