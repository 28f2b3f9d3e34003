"""Results of an analysis, as plain data: of every weight, of all of a kind, and in total."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamconv.analysis.measuring import DenseSums, Measured
from streamconv.analysis.rounded import GridSums, RoundedSums
from streamconv.analysis.sums import total


@dataclass(frozen=True, slots=True)
class Stored:
    """One way to store a target T, as Q. `kept` is <Q - B, D> / ||D||², `error` ||Q - T|| / ||D||, `changed` the share
    of entries stored as another number than the base alone would be.
    """

    kept: float
    error: float
    changed: float


@dataclass(frozen=True, slots=True)
class OnGrid:
    """A target and a format with codes.

    `step` is the mean step of the grid, `delta_to_step` mean |D| / step (see `streamconv.analysis.prediction`);
    `predicted_kept` is of nearest rounding, None where the base does not lie on the grid. Block maxima: relative change
    from base to target, by blocks that share a scale. `roundings` are by name.
    """

    step: float
    delta_to_step: float
    predicted_kept: float | None
    block_maximum_change: float
    largest_block_maximum_change: float
    roundings: Mapping[str, Stored]


@dataclass(frozen=True, slots=True)
class TargetAnalysis:
    """A target T = B + D. Norms are Frobenius norms, kurtosis is excess kurtosis; before: of B, after: of T.

    Outliers are entries further than 6 standard deviations of B from its mean. `base_error` is ||W - B|| and
    `base_error_to_delta` ||W - B|| / ||D||, None where the base was not rounded here. `dense` is the result in the
    weight's own float type, `formats` are by name.
    """

    delta: float
    base: float
    delta_to_base: float
    mean_delta: float
    delta_kurtosis: float
    kurtosis_before: float
    kurtosis_after: float
    outliers_before: int
    outliers_after: int
    outlier_share_before: float
    outlier_share_after: float
    base_error: float | None
    base_error_to_delta: float | None
    dense: Stored
    formats: Mapping[str, OnGrid]


@dataclass(frozen=True, slots=True)
class WeightAnalysis:
    """One weight; `targets` are T, F or both. `kind` is its module's name (`q_proj`), `dtype` that of `dense`."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    targets: Mapping[str, TargetAnalysis]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Result of `analyze`. In `total` and `kinds`, sums are over all entries of the weights together.

    `targets` says in words what T and F are here, `auto` what `--rounding auto` chooses by target and format, `advice`
    is for people. Sizes in bytes, times in seconds.
    """

    base: str
    adapter: str
    targets: Mapping[str, str]
    auto: Mapping[str, Mapping[str, str]]
    advice: tuple[str, ...]
    total: Mapping[str, TargetAnalysis]
    kinds: Mapping[str, Mapping[str, TargetAnalysis]]
    weights: tuple[WeightAnalysis, ...]
    plots: tuple[str, ...]
    seconds: float
    bytes_read: int
    peak_ram_bytes: int
    planned_ram_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def targets_of(measured: Sequence[Measured]) -> Mapping[str, TargetAnalysis]:
    """Analyses by target, each of all these weights together."""
    names = dict.fromkeys(target for each in measured for target in each.dense)
    return {name: _target(name, measured) for name in names}


def _target(name: str, measured: Sequence[Measured]) -> TargetAnalysis:
    dense: DenseSums = total(each.dense[name] for each in measured if name in each.dense)
    update, count = dense.update, dense.update.before.count
    delta = math.sqrt(update.update.squares)
    base = math.sqrt(update.before.squares)
    error = math.sqrt(update.base_error) if update.base_error else None
    return TargetAnalysis(
        delta=delta,
        base=base,
        delta_to_base=_share(delta, base),
        mean_delta=_share(update.magnitudes, count),
        delta_kurtosis=update.update.kurtosis,
        kurtosis_before=update.before.kurtosis,
        kurtosis_after=update.after.kurtosis,
        outliers_before=dense.outliers.before,
        outliers_after=dense.outliers.after,
        outlier_share_before=_share(dense.outliers.before, count),
        outlier_share_after=_share(dense.outliers.after, count),
        base_error=error,
        base_error_to_delta=None if error is None else _share(error, delta),
        dense=Stored(
            _share(update.kept, update.update.squares),
            _share(math.sqrt(update.error), delta),
            _share(update.changed, count),
        ),
        formats=_formats(name, measured),
    )


def _formats(target: str, measured: Sequence[Measured]) -> Mapping[str, OnGrid]:
    names = dict.fromkeys(key[1] for each in measured for key in each.grids if key[0] == target)
    return {name: _on_grid((target, name), measured) for name in names}


def _on_grid(key: tuple[str, str], measured: Sequence[Measured]) -> OnGrid:
    mine = [each for each in measured if key in each.grids]
    grid: GridSums = total(each.grids[key] for each in mine)
    magnitudes = sum(each.dense[key[0]].update.magnitudes for each in mine)
    roundings = dict.fromkeys(found[2] for each in mine for found in each.rounded if found[:2] == key)
    rounded = {name: total(each.rounded[*key, name] for each in mine) for name in roundings}
    delta = next(iter(rounded.values())).delta
    return OnGrid(
        step=_share(grid.steps, grid.count),
        delta_to_step=_share(magnitudes, grid.steps),
        predicted_kept=_share(grid.predicted, delta) if grid.predicted else None,
        block_maximum_change=_share(grid.blocks.change, grid.blocks.count),
        largest_block_maximum_change=grid.blocks.largest.value,
        roundings={name: _stored(found) for name, found in rounded.items()},
    )


def _stored(found: RoundedSums) -> Stored:
    return Stored(
        _share(found.kept, found.delta),
        _share(math.sqrt(found.error), math.sqrt(found.delta)),
        _share(found.changed, found.count),
    )


def _share(part: float, whole: float) -> float:
    """0 of nothing: an update of zero size keeps nothing and loses nothing."""
    return part / whole if whole else 0.0


def by_kind(kinds: Iterable[tuple[str, Measured]]) -> Mapping[str, Mapping[str, TargetAnalysis]]:
    """Measures of all weights of each kind, in the order in which kinds appear."""
    found: dict[str, list[Measured]] = {}
    for kind, measured in kinds:
        found.setdefault(kind, []).append(measured)
    return {kind: targets_of(each) for kind, each in found.items()}
