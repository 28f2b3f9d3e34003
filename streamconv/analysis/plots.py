"""An analysis as pictures: what nearest rounding keeps against the size of the update, and what becomes of outliers.

Needs matplotlib; figures are drawn without a display, and nothing of matplotlib's own state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from streamconv.analysis.prediction import predicted_kept
from streamconv.analysis.result import Analysis, OnGrid, TargetAnalysis
from streamconv.checkpoint.writer import write_file
from streamconv.errors import OutputError
from streamconv.formats import FORMATS
from streamconv.kernels.grids import ROW

_SIZE, _DPI = (8.0, 5.0), 120
# Okabe and Ito's colours, which all eyes tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(found: Analysis, folder: Path) -> tuple[str, ...]:
    """Write the plots to `folder`, which is made if need be; return their paths.

    Raises OutputError where they cannot be written.
    """
    plots: dict[str, Callable[[Analysis], Figure | None]] = {
        "kept.png": _kept,
        "kurtosis.png": _kurtosis,
        "block-maxima.png": _block_maxima,
    }
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, plot in plots.items():
            figure = plot(found)
            if figure is not None:
                drawn = BytesIO()
                figure.savefig(drawn, dpi=_DPI)
                write_file(folder / name, drawn.getbuffer())  # a link of that name is replaced, not followed
                paths.append(str(folder / name))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write the plots there: {error.strerror}; choose another --report"
        ) from error
    return tuple(paths)


def _kept(found: Analysis) -> Figure | None:
    """Kept share of nearest and stochastic rounding against the delta-to-step ratio, a point a weight."""
    name = next((name for name in _formats(found) if _is_on_grid(found, name)), None)
    name = name or next(iter(_formats(found)), None)
    if name is None:
        return None
    figure, axes = _figure(f"How much of the update {name} keeps, weight by weight")
    ratios: list[float] = []
    for place, (target, rounding) in enumerate(_ways(found, name)):
        points = _on_grids(found, target, name)
        ratios += [each.delta_to_step for each in points]
        kept = [each.roundings[rounding].kept for each in points]
        _scatter(axes, [each.delta_to_step for each in points], kept, place, f"{rounding} of {target}")
    if _is_on_grid(found, name):
        tails = [each.delta_kurtosis for each in _of_target(found, "T") if name in each.formats]
        _curve(axes, name, ratios, median(tails))
    axes.set_xscale("log")
    axes.set_xlabel("mean |D| / mean step of the grid")
    axes.set_ylabel("kept share: <Q - B, D> / ||D||²")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _curve(axes: Axes, name: str, ratios: Sequence[float], kurtosis: float) -> None:
    """Predicted share kept by nearest rounding on the base's own grid; `kurtosis` is that of a usual update here."""
    grid = FORMATS[name].grid
    positive = [ratio for ratio in ratios if ratio > 0]
    if grid is None or grid.block == ROW or not positive:  # blocks of every width have a curve of their own
        return
    x = np.geomspace(min(0.01, min(positive) / 1.5), max(1.0, max(positive) * 1.5), 60)
    for tails, style in ((kurtosis, "-"), (0.0, ":")):
        label = f"nearest of T predicted, excess kurtosis of D {tails:.1f}"
        kept = [predicted_kept(float(ratio), grid, tails) for ratio in x]
        axes.plot(x, kept, style, color="#444444", linewidth=1.2, zorder=1, label=label)


def _kurtosis(found: Analysis) -> Figure:
    figure, axes = _figure("Excess kurtosis of each weight before and after the update")
    for place, (target, total) in enumerate(found.total.items()):
        before = [each.kurtosis_before for each in _of_target(found, target)]
        after = [each.kurtosis_after for each in _of_target(found, target)]
        outliers = f"{total.outliers_before} entries beyond 6 sigma before, {total.outliers_after} after"
        _scatter(axes, before, after, place, f"{target}: {outliers}")
    axes.axline((0, 0), slope=1, color="#999999", linewidth=1.0, zorder=1)
    axes.set_xlabel("before (base)")
    axes.set_ylabel("after (base + update)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _block_maxima(found: Analysis) -> Figure | None:
    """Mean and largest relative change of the greatest magnitude of a block, by size of the update."""
    name = next(iter(_formats(found)), None)
    if name is None:
        return None
    figure, axes = _figure(f"How far the update moves the scales of {name} blocks")
    for place, target in enumerate(found.total):
        of_target = [each for each in _of_target(found, target) if name in each.formats]
        size = [each.delta_to_base for each in of_target]
        mean = [each.formats[name].block_maximum_change for each in of_target]
        largest = [each.formats[name].largest_block_maximum_change for each in of_target]
        _scatter(axes, size, mean, 2 * place, f"{target}: mean over blocks")
        _scatter(axes, size, largest, 2 * place + 1, f"{target}: largest of all blocks")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("||D|| / ||B||")
    axes.set_ylabel("relative change of a block's greatest magnitude")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.25)
    return figure, axes


def _scatter(axes: Axes, x: Sequence[float], y: Sequence[float], place: int, label: str) -> None:
    mark, colour = _MARKS[place % len(_MARKS)], _COLOURS[place % len(_COLOURS)]
    axes.scatter(x, y, s=18, marker=mark, color=colour, alpha=0.7, linewidths=0, label=label, zorder=2)


def _formats(found: Analysis) -> list[str]:
    return list(dict.fromkeys(name for target in found.total.values() for name in target.formats))


def _is_on_grid(found: Analysis, name: str) -> bool:
    """Whether a target lies on the format's grid but for the update."""
    return any(
        name in target.formats and target.formats[name].predicted_kept is not None
        for target in found.total.values()
    )


def _ways(found: Analysis, name: str) -> list[tuple[str, str]]:
    return [
        (target, rounding)
        for target, each in found.total.items()
        if name in each.formats
        for rounding in each.formats[name].roundings
    ]


def _of_target(found: Analysis, target: str) -> list[TargetAnalysis]:
    return [weight.targets[target] for weight in found.weights if target in weight.targets]


def _on_grids(found: Analysis, target: str, name: str) -> list[OnGrid]:
    return [each.formats[name] for each in _of_target(found, target) if name in each.formats]
