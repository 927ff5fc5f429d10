"""The one picture of the README: pass@1 by round beside the best-of-n curves."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FormatStrFormatter, PercentFormatter

from alignment import atomic
from alignment.errors import UserError
from alignment.report.accuracy import models
from alignment.report.collect import Collected
from alignment.report.plots import Curve
from alignment.report.ranking import best_of_curves
from alignment.report.svg import apart

INK, SOFT, LINE, ACCENT, QUIET = "#1c1f23", "#5d636b", "#e3e3de", "#1f5fd0", "#9aa0a8"
PIXELS, DPI = (1600, 700), 140
LINE_STYLES = {"dashed": (0, (4, 3)), "dotted": (0, (1, 2))}


def draw(collected: Collected, file: Path) -> None:
    """Write the picture as PNG.

    Raises:
        UserError: the evaluation or best-of-n has not finished.
    """
    evaluated = [(model.name, model.accuracy) for model in models(collected) if model.accuracy is not None]
    lines = [line for stage in collected.of("reward.best_of_n")[:1] for line in best_of_curves(stage)]
    if not evaluated or not lines:
        raise UserError(
            f"{collected.path}: the picture needs a finished evaluation and best-of-n; run the pipeline first"
        )
    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.2, wspace=0.06)
    figure = Figure(figsize=(PIXELS[0] / DPI, PIXELS[1] / DPI), dpi=DPI, facecolor="white", layout=layout)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _accuracy(left, [name for name, _ in evaluated], [(e.value, e.low, e.high) for _, e in evaluated])
    _best_of_n(right, lines)
    with atomic.replacing(file) as temporary:
        figure.savefig(temporary, format="png")


def _accuracy(axes: Axes, names: list[str], estimates: list[tuple[float, float, float]]) -> None:
    places = range(len(names))
    values = [value for value, _, _ in estimates]
    errors = [[value - low for value, low, _ in estimates], [high - value for value, _, high in estimates]]
    axes.errorbar(places, values, errors, color=ACCENT, marker="o", markersize=5, linewidth=1.6, capsize=0)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.1%}", (place, value), (7, -11), textcoords="offset points", fontsize=9, weight="bold", color=INK
        )
    axes.set_xticks(list(places), names)
    axes.set_xlim(-0.35, len(names) - 0.45)
    _style(axes, "pass@1 on held-out prompts, 95% intervals")


def _best_of_n(axes: Axes, lines: list[Curve]) -> None:
    for line in lines:
        x, y = zip(*line.points, strict=True)
        strong = line.kind == "curve strong"
        color, width = (ACCENT, 2.2) if strong else (QUIET, 1.2)
        axes.plot(x, y, color=color, linewidth=width, linestyle=LINE_STYLES.get(line.kind, "solid"))
        if line.band:
            low, high = zip(*line.band, strict=True)
            axes.fill_between(x, low, high, color=ACCENT, alpha=0.13, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    last = max(x for line in lines for x, _ in line.points)
    axes.set_xlim(1, last)
    axes.set_xlabel("samples chosen from", fontsize=9, color=SOFT)
    _style(axes, "best of n by each reward model")
    bottom, top = axes.get_ylim()
    heights = apart([line.points[-1][1] for line in lines], (top - bottom) / 24, bottom, top)
    for line, height in zip(lines, heights, strict=True):
        strong = line.kind == "curve strong"
        axes.annotate(
            line.name, (last, height), (5, 0), textcoords="offset points", va="center", fontsize=9,
            color=ACCENT if strong else SOFT, weight="bold" if strong else "normal", annotation_clip=False,
        )  # fmt: skip


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, weight="bold", color=INK, pad=14)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(labelsize=9, colors=SOFT, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
