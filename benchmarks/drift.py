"""Drift alarms: how often a stream like its reference raises one, and how often a shift of a given size is found.

    python -m benchmarks.drift [PICTURE.png]

Rows are drawn from a mixture of twelve topics in 16 dimensions; a stream is four windows of 150 rows against 600 of
reference, with all three tests. Without a shift the chance of any alarm has to be at most the level, 0.05, over 1,000
streams; the peer tests each window at the level by itself, as is common. With a shift in the last window, the power is
the share of streams in which that window is found: by mixture weights (a share of its rows goes to the three rarest
topics) and by the mean (every row moves, in standard deviations of a topic). The peer is a Kolmogorov-Smirnov test of
each dimension, with Bonferroni's correction for dimensions and windows, held to the same level.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from benchmarks import report
from data_builders.config import DriftConfig
from data_builders.drift_tests import Clusters, Usage, Window, examine
from data_builders.two_sample import holm

TOPICS, DIMENSIONS = 12, 16
REFERENCE, WINDOWS, ROWS = 600, 4, 150
NULL_STREAMS, STREAMS = 1000, 80
WEIGHT_SHIFTS, MEAN_SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.3), (0.25, 0.5, 0.75, 1.0, 1.5)
STATED = {"weights": 0.2, "mean": 0.75}
LABELS = {
    "all": "all three, Holm",
    "mmd": "MMD alone",
    "classifier": "classifier alone",
    "jensen_shannon": "Jensen-Shannon alone",
    "ks": "KS of each dimension",
}
COLOURS = dict(zip(LABELS, ("#222222", "#0072B2", "#D55E00", "#009E73", "#999999"), strict=True))
CONFIG = DriftConfig.model_validate(
    {
        "output_dir": "unused",
        "reference": {"rows": "unused", "vectors": "unused"},
        "stream": {"rows": "unused", "vectors": "unused"},
        "clusters": 16,
        "permutations": 999,
        "block": 150,
    }
)


class Topics:
    """A mixture of topics, the first most frequent."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.centres = rng.normal(size=(TOPICS, DIMENSIONS))
        self.weights = np.arange(TOPICS, 0, -1) / np.arange(TOPICS + 1).sum()
        direction = rng.normal(size=DIMENSIONS)
        self.direction = direction / np.linalg.norm(direction)

    def draw(self, rows: int, to_the_rarest: float = 0.0, mean: float = 0.0) -> NDArray[np.float64]:
        weights = self.weights * (1 - to_the_rarest)
        weights[-3:] += to_the_rarest / 3
        topic = self.rng.choice(TOPICS, rows, p=weights)
        return self.centres[topic] + self.rng.normal(size=(rows, DIMENSIONS)) + mean * self.direction


def stream(seed: Sequence[int], **shift: float) -> tuple[list[Window], list[float]]:
    """A stream examined, whose last window is shifted, if at all; and the peer's smallest p-value in each window."""
    rng = np.random.default_rng(seed)
    topics = Topics(rng)
    reference = topics.draw(REFERENCE)
    windows = [topics.draw(ROWS) for _ in range(WINDOWS - 1)] + [topics.draw(ROWS, **shift)]
    config = CONFIG.model_copy(update={"seed": int(rng.integers(1 << 31))})
    clusters = Clusters(reference, config.clusters, config.seed)
    found = examine(
        Usage(reference, clusters.nearest(reference)[0]),
        clusters.held_N,
        [Usage(window, clusters.nearest(window)[0]) for window in windows],
        config,
    )
    return found, [float(ks_2samp(reference, window).pvalue.min()) for window in windows] if shift else []


def detected(found: Sequence[Window], ks: Sequence[float]) -> dict[str, bool]:
    """Whether the last window is found: by all tests together, by each alone, by the peer; each held to the level."""
    alone = {name: holm([window.tests[name].p for window in found])[-1] for name in CONFIG.tests}
    peer = holm([min(1.0, p * DIMENSIONS) for p in ks])[-1]
    hits: dict[str, bool] = {name: p <= CONFIG.level for name, p in alone.items()}
    return {"all": found[-1].drifted, **hits, "ks": peer <= CONFIG.level}


def power(shifts: Sequence[float], name: str, number: int) -> list[dict[str, float]]:
    """For each size of shift the share of streams in which it is found."""
    curve = []
    for place, size in enumerate(shifts):
        hits = [detected(*stream([number, place, draw], **{name: size})) for draw in range(STREAMS)]
        curve.append({key: float(np.mean([hit[key] for hit in hits])) for key in LABELS})
        print(f"{name} {size}: {curve[-1]}", flush=True)
    return curve


def main(argv: Sequence[str]) -> None:
    settings: dict[str, Any] = {"reference_rows": REFERENCE, "windows": WINDOWS, "window_rows": ROWS}
    null = [stream([0, draw])[0] for draw in range(NULL_STREAMS)]
    rate = float(np.mean([any(window.alarm for window in windows) for windows in null]))
    by_itself = [any(t.p <= CONFIG.level for window in windows for t in window.tests.values()) for windows in null]
    report(
        "drift.false_alarm_rate",
        rate,
        "share of streams",
        "each test and window at the level by itself",
        better="lower",
        peer_value=float(np.mean(by_itself)),
        level=CONFIG.level,
        streams=NULL_STREAMS,
        **settings,
    )
    curves = {
        "weights": (WEIGHT_SHIFTS, power(WEIGHT_SHIFTS, "to_the_rarest", 1)),
        "mean": (MEAN_SHIFTS, power(MEAN_SHIFTS, "mean", 2)),
    }
    for name, (shifts, curve) in curves.items():
        found = curve[shifts.index(STATED[name])]
        report(
            f"drift.power_at_{name}_{STATED[name]:g}",
            found["all"],
            "share of streams",
            "KS of each dimension, Bonferroni",
            peer_value=found["ks"],
            streams=STREAMS,
            alone={test: found[test] for test in CONFIG.tests},
            **settings,
        )
    if argv:
        draw(curves, rate, Path(argv[0]))


def draw(curves: Mapping[str, tuple[Sequence[float], list[dict[str, float]]]], rate: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "weights": "share of the window's rows that goes to rare topics",
        "mean": "shift of the mean, in standard deviations of a topic",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for one, (name, (shifts, curve)) in zip(axes, curves.items(), strict=True):
        for key, label in LABELS.items():
            heights = [point[key] for point in curve]
            width = 2.4 if key == "all" else 1.3
            one.plot(shifts, heights, color=COLOURS[key], label=label, marker="o", markersize=3.5, linewidth=width)
        one.axhline(CONFIG.level, color="#777777", linestyle="--", linewidth=1)
        one.set_xlabel(titles[name], fontsize=9)
        one.spines[["top", "right"]].set_visible(False)
        one.set_ylim(0, 1.02)
    axes[0].set_ylabel("share of shifted windows found", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    title = f"{ROWS}-row windows, {REFERENCE} rows of reference; any alarm without a shift: {rate:.1%} of streams"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
