"""The picture of a drift report: how far each test is from its threshold, performance, and the clusters that moved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignment import atomic
from data_builders import usage
from data_builders.config import DriftConfig
from data_builders.drift_tests import Window, level_of_one

COLOURS = {"mmd": "#0072B2", "classifier": "#D55E00", "jensen_shannon": "#009E73"}
GREY, ALARM = "#777777", "#CC3311"
CLUSTERS = 10  # bars at most


def draw(config: DriftConfig, windows: Sequence[Window], clusters: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of one panel a subject."""
    panels = 2 + (config.performance is not None)
    figure, axes = plt.subplots(panels, 1, figsize=(9, 3.1 * panels), layout="constrained")
    _tests(axes[0], config, windows)
    if config.performance is not None:
        _performance(axes[1], config, windows)
    _clusters(axes[-1], clusters[:CLUSTERS])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def _tests(axes: Axes, config: DriftConfig, windows: Sequence[Window]) -> None:
    level = level_of_one(config, len(windows))
    numbers = range(1, len(windows) + 1)
    for name in config.tests:
        results = [window.tests[name] for window in windows]
        thresholds = [result.threshold(level) - result.expected for result in results]
        heights = [
            result.effect / limit if limit > 0 else 0.0 for result, limit in zip(results, thresholds, strict=True)
        ]
        axes.plot(numbers, heights, color=COLOURS[name], marker="o", markersize=4, label=name.replace("_", "-"))
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.axhline(0, color=GREY, linewidth=0.5)
    for number, window in zip(numbers, windows, strict=True):
        if window.alarm:
            axes.axvspan(number - 0.5, number + 0.5, color=ALARM, alpha=0.12, linewidth=0)
    axes.set_title("Tests: 0 as expected without drift, 1 the threshold; alarms shaded", fontsize=10, loc="left")
    _windows(axes, len(windows))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _performance(axes: Axes, config: DriftConfig, windows: Sequence[Window]) -> None:
    assert config.performance is not None
    sign = usage.sign(config)
    known = [(number, window.performance) for number, window in enumerate(windows, start=1) if window.performance]
    axes.plot([n for n, _ in known], [sign * p.after for _, p in known], color="#222222", marker="o", markersize=4)
    axes.plot([n for n, _ in known], [sign * p.before for _, p in known], color=GREY, linestyle="--", linewidth=1)
    fell = [(number, window.performance) for number, window in enumerate(windows, start=1) if window.fell]
    axes.scatter([n for n, _ in fell], [sign * p.after for _, p in fell if p], color=ALARM, zorder=3)
    better = config.performance.better
    title = f"Mean {config.performance.column}, {better} is better: dashed the reference, red where it fell"
    axes.set_title(title, fontsize=10, loc="left")
    _windows(axes, len(windows))


def _windows(axes: Axes, count: int) -> None:
    axes.set_xlim(0.5, count + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("window", fontsize=9)


def _clusters(axes: Axes, clusters: Sequence[dict[str, Any]]) -> None:
    axes.set_title("Clusters that moved: share of the reference (grey) and of those windows", fontsize=10, loc="left")
    if not clusters:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_axis_off()
        return
    places = range(len(clusters))
    axes.barh(places, [one["share_before"] for one in clusters], height=0.8, color="#cccccc")
    colours = [ALARM if one["share_after"] > one["share_before"] else COLOURS["mmd"] for one in clusters]
    axes.barh(places, [one["share_after"] for one in clusters], height=0.35, color=colours)
    labels = [_label(one) for one in clusters]
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _label(one: dict[str, Any]) -> str:
    """The cluster's number and how its most typical text begins; letters that no font has are left out."""
    text = "".join(c for c in " ".join(one["typical"][:1]) if c.isascii()).split()
    return f"{one['cluster']}: {' '.join(text)[:28]}"
