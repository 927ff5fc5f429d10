"""The interference of adapters as heat maps: every model on every language, against the base and the joint adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from alignment import atomic
from sft.config import BASE, JOINT
from sft.interference import Matrix, change

INK, SOFT = "#1c1f23", "#5d636b"
# Better than the other, the same, worse: told apart by every kind of eye, and by their lightness from nothing.
COLOURS = LinearSegmentedColormap.from_list("change", ["#2166ac", "#a9cbe3", "#f7f7f5", "#f2b896", "#b2401b"])
LEAST_REACH = 0.05  # nats: smaller changes than that look even
CELL, MARGIN = (1.05, 0.62), (2.1, 1.8)  # inches
FAINT = 0.72  # share of the reach from which a cell is dark, and its text white


def draw(found: Matrix, groups: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write `path`, a PNG: changes in nats; an adapter's own languages are framed, uncertain changes in brackets."""
    others = [name for name in (BASE, JOINT) if name in found]
    columns, rows = len(found[BASE]), len(found) - 1
    width = len(others) * (MARGIN[0] + CELL[0] * columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.04)
    figure = Figure(figsize=(width, MARGIN[1] + CELL[1] * rows), dpi=150, facecolor="white", layout=layout)
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    reach = max(
        [LEAST_REACH, *(abs(change(found[n][w], o).value) for o in others for n in found if n != o for w in found[n])]
    )
    images = [_panel(axes, found, groups, other, reach) for axes, other in zip(panels, others, strict=True)]
    bar = figure.colorbar(images[-1], ax=list(panels), shrink=0.9, aspect=18, pad=0.015)
    bar.set_label("change of the loss, nats a token", fontsize=9, color=SOFT)
    bar.ax.tick_params(labelsize=8.5, colors=SOFT, length=0)
    bar.outline.set_visible(False)
    figure.supxlabel("framed: an adapter's own languages; in brackets: no certain change (95%)", fontsize=9, color=SOFT)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _panel(axes: Axes, found: Matrix, groups: Mapping[str, Sequence[str]], other: str, reach: float) -> AxesImage:
    names, languages = [name for name in found if name != other], list(found[BASE])
    changes = [[change(found[name][language], other) for language in languages] for name in names]
    values = [[each.value for each in row] for row in changes]
    image = axes.imshow(values, cmap=COLOURS, vmin=-reach, vmax=reach, aspect="auto")
    for y, name in enumerate(names):
        for x, language in enumerate(languages):
            each = changes[y][x]
            certain = not each.low <= 0 <= each.high
            ink = ("white" if abs(each.value) > FAINT * reach else INK) if certain else SOFT
            text = f"{each.value:+.2f}" if certain else f"({each.value:+.2f})"
            axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color=ink)
            if language in groups.get(name, ()):
                axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=INK, linewidth=1.6))
    axes.set_xticks(range(len(languages)), languages)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(colors=INK, labelsize=9.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("held-out rows in", fontsize=9.5, color=SOFT)
    against = "the base" if other == BASE else "the joint adapter"
    axes.set_title(f"Against {against}", fontsize=10.5, loc="left", color=INK)
    return image
