"""The pictures of docs/why-merging-loses-quality.md, from the results of the study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from streamconv.analysis.prediction import predicted_kept
from streamconv.comparison.bootstrap import mean
from streamconv.kernels.grids import NF4
from tools.study.bars import Results, row_of
from tools.study.beds import BEDS
from tools.study.tables import STRATEGIES

INK, FAINT = "#30353a", "#b9bec4"
COLORS = dict(zip(BEDS, ("#1f6f8b", "#c8553d", "#7a9e3a", "#8a5a9e"), strict=True))


def dead_zone(beds: Mapping[str, Results], others: Results, path: Path) -> None:
    """Kept share of nearest rounding of T against the delta-to-step ratio: formula, synthetic layers, real weights."""
    figure = Figure(figsize=(9, 5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    kurtoses = [0.0]
    for name, weights in _measured(beds):
        kurtoses += [weight["delta_kurtosis"] for weight in weights]
        places = [weight["ratio"] for weight in weights]
        kept = [weight["kept"] for weight in weights]
        axes.plot(places, kept, ".", color=COLORS[name], alpha=0.55, markersize=6, label=BEDS[name].label)
    ratios = np.geomspace(0.005, 1.2, 200)
    curve = [predicted_kept(float(ratio), NF4) for ratio in ratios]
    axes.plot(ratios, curve, color=INK, linewidth=1.5, label="formula, Gaussian delta")
    middle = float(np.median(kurtoses))
    curve = [predicted_kept(float(ratio), NF4, middle) for ratio in ratios]
    label = f"formula, delta with excess kurtosis {middle:.1f}, the median here"
    axes.plot(ratios, curve, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=label)
    if synthetic := others["synthetic"]:
        rows = synthetic["dead_zone"]
        axes.errorbar(
            [row["ratio"]["mean"] for row in rows],
            [row["nearest_T"]["mean"] for row in rows],
            yerr=[row["nearest_T"]["sd"] for row in rows],
            fmt="o", color=INK, markersize=4, capsize=2, mfc="white", label="synthetic layers, ± standard deviation",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(
        [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
        ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"],
    )
    axes.set_xlabel("size of the delta: mean |D| / mean step of the grid", color=INK)
    axes.set_title(
        "Share of the fine-tune that nearest rounding of T keeps", loc="left", fontsize=11, color=INK
    )
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def strategies(beds: Mapping[str, Results], path: Path) -> None:
    """KL to T of every strategy, a panel a bed, with 95 % intervals."""
    figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2).flatten()
    for axes, (name, results) in zip(panels, beds.items(), strict=True):
        if row_of(results, "T") is None:
            axes.set_visible(False)
            continue
        found = [
            (label, mean(row.kl))
            for strategy, label in STRATEGIES.items()
            if strategy != "T" and (row := row_of(results, strategy)) is not None
        ]
        places = range(len(found))
        middle = np.array([estimate.value for _, estimate in found])
        ends = np.array([[estimate.low, estimate.high] for _, estimate in found]).reshape(-1, 2).T
        colors = [COLORS[name] if "feedback" in label else INK for label, _ in found]
        for place, value, low, high, color in zip(places, middle, *ends, colors, strict=True):
            axes.errorbar(
                value,
                place,
                xerr=[[value - low], [high - value]],
                fmt="o",
                color=color,
                capsize=2,
                markersize=5,
            )
            axes.annotate(
                f"{value:.2g}",
                (high, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
        axes.set_xscale("log")
        axes.set_xlim(right=4 * max(middle, default=1))
        axes.set_yticks(places, [label for label, _ in found], fontsize=8, color=INK)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="x", color=FAINT, linewidth=0.4)
        axes.set_title(BEDS[name].label, loc="left", fontsize=10, color=INK)
    figure.suptitle(
        "KL to the trained model T on held-out text, nats a token (less is better)", fontsize=11, color=INK
    )
    _save(figure, path, spines=("top", "right"))


def distributions(beds: Mapping[str, Results], path: Path) -> None:
    """Kurtosis and largest entry of every adapted weight before merging, after it, and after nearest rounding."""
    figure = Figure(figsize=(10, 4.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    panels: Sequence[tuple[Any, str, str]] = (
        (left, "kurtosis", "kurtosis (normal: 3)"),
        (right, "largest", "largest entry, root mean squares"),
    )
    for axes, key, title in panels:
        ends: list[float] = []
        for name, weights in _measured(beds):
            before = [weight["shape_before"][key] for weight in weights]
            after = [weight["shape_of_target"][key] for weight in weights]
            axes.plot(before, after, ".", color=COLORS[name], alpha=0.5, label=BEDS[name].label)
            ends += before + after
        if ends:
            line = [min(ends) * 0.95, max(ends) * 1.05]
            axes.plot(line, line, color=FAINT, linewidth=1, zorder=0)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("base, before merging", color=INK)
        axes.set_ylabel("T, after merging", color=INK)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(
        "Merging does not make outliers: every adapted weight before and after", fontsize=11, color=INK
    )
    _save(figure, path)


def _measured(beds: Mapping[str, Results]) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Names and weights of the beds that have been measured."""
    return ((name, results["weights"]) for name, results in beds.items() if results.get("weights"))


def _save(figure: Figure, path: Path, spines: Sequence[str] = ("top", "right")) -> None:
    for axes in figure.axes:
        axes.spines[list(spines)].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    # No date in the file: the same results give the same picture.
    figure.savefig(path, dpi=144, metadata={"Software": None})


PICTURES: Mapping[str, Callable[[Mapping[str, Results], Results, Path], None]] = {
    "why-dead-zone.png": dead_zone,
    "why-strategies.png": lambda beds, _, path: strategies(beds, path),
    "why-distributions.png": lambda beds, _, path: distributions(beds, path),
}
