"""A selection as a picture: target, before and after on one map of meaning.

The map is the plane of the target's first two principal components; a point is a row.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from alignment import atomic
from data_builders.selection.config import SelectConfig
from data_builders.selection.sources import Sources
from data_builders.vectors import sample, take

Array = NDArray[np.floating]

POINTS = 3_000
DOTS_PER_INCH = 150
TARGET, TRAINING, DRAWN, POOL = "#0072B2", "#555555", "#D55E00", "#d9d9d9"


def draw(config: SelectConfig, sources: Sources, drawn_N: NDArray[np.bool_], path: Path) -> None:
    """Three panels of at most POINTS rows each; of training and drawn rows together each has its share of points."""
    rng = np.random.default_rng(config.seed)
    target = sample(sources.target.vectors_ND, POINTS, rng)
    plane = PCA(2).fit(target)
    empty = np.empty((0, 2))
    drawn = np.flatnonzero(drawn_N)
    training_rows = 0 if sources.training is None else len(sources.training)
    of_drawn = round(POINTS * len(drawn) / max(1, training_rows + len(drawn)))  # as many as is its part of both
    chosen = np.sort(rng.permutation(drawn)[:of_drawn])
    layers = {
        "target": plane.transform(target),
        "pool": plane.transform(sample(sources.pool.vectors_ND, POINTS, rng)),
        "training": empty,
        "drawn": plane.transform(take(sources.pool.vectors_ND, chosen)) if len(chosen) else empty,
    }
    if sources.training is not None:
        layers["training"] = rng.permutation(plane.transform(sample(sources.training.vectors_ND, POINTS, rng)))
    _write(config, layers, training_rows, len(drawn), len(sources.target), path)


def _write(config: SelectConfig, layers: dict[str, Array], training: int, drawn: int, target: int, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 4.9), layout="constrained", sharex=True, sharey=True)
    titles = (
        f"Target: {target:,} rows",
        f"Before: {training:,} training rows" if training else "Before: no training rows",
        f"After: {training:,} training rows and {drawn:,} drawn" if training else f"After: {drawn:,} rows drawn",
    )
    for axes, title in zip(panels, titles, strict=True):
        _scatter(axes, layers["pool"], POOL, "pool", size=4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#dddddd")
    _scatter(panels[0], layers["target"], TARGET, "target")
    _scatter(panels[1], layers["training"], TRAINING, "training")
    _scatter(
        panels[2],
        layers["training"][: len(layers["training"]) * training // max(1, training + drawn)],
        TRAINING,
        "training",
    )
    _scatter(panels[2], layers["drawn"], DRAWN, f"drawn by {config.method}")
    for axes in panels:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.02, 0),
            ncols=3,
            fontsize=8.5,
            frameon=False,
            markerscale=2.5,
            handletextpad=0.1,
            columnspacing=1.2,
        )
    both = np.concatenate([layers["target"], layers["training"], layers["drawn"]])
    low, high = np.quantile(both, [0.002, 0.998], axis=0)
    margin = 0.08 * (high - low)
    panels[0].set_xlim(low[0] - margin[0], high[0] + margin[0])
    panels[0].set_ylim(low[1] - margin[1], high[1] + margin[1])
    figure.supxlabel("first two principal components of the target's vectors", fontsize=9, color="#555555")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")
    plt.close(figure)


def _scatter(axes: Axes, points: Array, colour: str, label: str, size: float = 7) -> None:
    if len(points):
        axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=0.5, linewidths=0, label=label)
