"""The trade-off as a picture: what reasoning gains, and what general ability loses, by the share of long answers."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from alignment import atomic
from sft.tradeoff import GENERAL, Point, largest

INK, SOFT, LINE, LIMIT = "#1c1f23", "#5d636b", "#e3e3de", "#b3261e"
COLOURS = ("#1f5fd0", "#9aa0a8")  # thinking, and not
GENERAL_COLOURS = ("#0f766e", "#D55E00", "#6A3D9A", "#8C564B", "#CC79A7", "#56B4E9")
FORMATS = ("png", "svg")


def draw(points: Sequence[Point], limit: float, path: Path) -> None:
    """Write `path`.png and `path`.svg: 95% intervals, the limit, and the share that is chosen."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.04)
    figure = Figure(figsize=(10.4, 4.8), dpi=150, facecolor="white", layout=layout)
    left, right = figure.subplots(1, 2)
    chosen, estimated = largest(points, limit)
    mark = (chosen, "chosen") if chosen else (estimated, "by the estimates alone")
    _reasoning(left, points)
    _general(right, points, limit)
    for axes in (left, right):
        _style(axes, points, *mark)
    for kind in FORMATS:
        with atomic.replacing(path.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind)


def _reasoning(axes: Axes, points: Sequence[Point]) -> None:
    for colour, (name, label) in zip(COLOURS, (("deep", "thinking on"), ("fast", "thinking off")), strict=True):
        intervals = [point.values[f"reasoning.{name}"] for point in points]
        _line(axes, points, [(i.value, i.low, i.high) for i in intervals], colour, label, 0.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("Reasoning: correct answers", fontsize=10.5, loc="left", color=INK)


def _general(axes: Axes, points: Sequence[Point], limit: float) -> None:
    names = [name for name in points[0].changes if name.startswith(GENERAL)]
    step = _width(points) * 0.012
    for number, name in enumerate(names):
        changes = [point.changes[name] for point in points]
        ends = [
            (0.0, 0.0, 0.0) if not p.share else (c.value, c.low, c.high) for p, c in zip(points, changes, strict=True)
        ]
        offset = step * (number - (len(names) - 1) / 2)
        _line(axes, points, ends, GENERAL_COLOURS[number % len(GENERAL_COLOURS)], name.removeprefix(GENERAL), offset)
    label = f"limit: {-100 * limit:g}"
    axes.axhline(-limit, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)), label=label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}" if value else "0"))
    axes.set_title("General ability, thinking off: change in points", fontsize=10.5, loc="left", color=INK)


def _line(
    axes: Axes, points: Sequence[Point], ends: Sequence[tuple[float, float, float]], colour: str, label: str, by: float
) -> None:
    """Estimates with their intervals, moved sideways where several share a place."""
    shares = [point.share + by for point in points]
    values = [value for value, _, _ in ends]
    errors = [[value - low for value, low, _ in ends], [high - value for value, _, high in ends]]
    axes.errorbar(shares, values, errors, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=label)


def _style(axes: Axes, points: Sequence[Point], marked: float, why: str) -> None:
    margin = 0.05 * _width(points)
    axes.set_xlim(-margin, points[-1].share + margin)
    axes.set_xticks([point.share for point in points])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    axes.set_xlabel("long answers, of the mixture's rows", fontsize=9.5, color=SOFT)
    if marked:
        label = f"{why}: {100 * marked:.3g}%"
        axes.axvspan(marked - margin / 3, marked + margin / 3, color=LINE, zorder=0, linewidth=0, label=label)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.16))
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _width(points: Sequence[Point]) -> float:
    return points[-1].share - points[0].share
