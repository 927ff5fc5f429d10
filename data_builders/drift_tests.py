"""Windows of usage against a reference: which drifted, in which the model did worse, and what raises an alarm.

Every test of every window is one hypothesis. Their p-values are adjusted together (Holm), so that a stream which is
like the reference raises any alarm at all with probability `level` at most, however many windows and tests there are:

    trigger.by   hypotheses                      level
    drift        tests x windows                 level
    performance  windows                         level
    both         those of either, side by side   level for each of the two; an alarm needs both
    either       those of either, side by side   level / 2 for each of the two

Clusters are found on one half of the reference, and shares are compared with those of the other half: on the rows that
it was fitted to, K-means is at home, and any new row would seem to have moved.

Shapes: N rows, D dimensions, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from alignment.errors import UserError
from alignment.progress import track
from data_builders import two_sample
from data_builders.config import DriftConfig, TriggerConfig
from data_builders.gaussian_kernel import Array
from data_builders.two_sample import Counts, Result

CLUSTERING_BATCH = 4_096
CLUSTERED_ROWS = 200_000  # of the reference, at most


@dataclass(frozen=True)
class Usage:
    """Rows of usage as arrays."""

    vectors_ND: Array
    clusters_N: NDArray[np.int64]
    performance_N: Array | None = None  # higher is better
    pairs_N: Sequence[str] | None = None  # what names the same question in reference and stream


@dataclass(frozen=True)
class Performance:
    """How well the model did before and in a window."""

    before: float
    after: float
    rows: int  # compared: of pairs their number
    result: Result

    @property
    def fall(self) -> float:
        return self.before - self.after


@dataclass
class Window:
    """What the tests say of one window; `adjusted` is over all windows and tests."""

    rows: int
    counts_K: Counts
    tests: dict[str, Result]
    shift: Result  # total variation over clusters
    residuals_K: Array
    moved_p_K: Array  # adjusted over clusters, not over windows
    performance: Performance | None
    adjusted: dict[str, float] = field(default_factory=dict)
    performance_adjusted: float | None = None
    drifted: bool = False
    fell: bool = False
    alarm: bool = False


class Clusters:
    """K-means on one half of the reference.

    Raises:
        UserError: more clusters than rows to find them on.
    """

    def __init__(self, vectors_ND: Array, count: int, seed: int) -> None:
        half = min(len(vectors_ND) // 2, CLUSTERED_ROWS)
        fitted = np.random.default_rng([seed, 0]).permutation(len(vectors_ND))[:half]
        if len(fitted) < count:
            raise UserError(f"clusters: {count} wanted, but half of the reference is {len(fitted)} rows")
        self.held_N = np.ones(len(vectors_ND), bool)  # the rows that it was not fitted to
        self.held_N[fitted] = False
        self._model = MiniBatchKMeans(count, batch_size=CLUSTERING_BATCH, n_init=3, random_state=seed)
        self._model.fit(np.asarray(vectors_ND[np.sort(fitted)], np.float32))

    def nearest(self, vectors_ND: Array) -> tuple[NDArray[np.int64], Array]:
        """The cluster of each row and the distance from its centre, [N] both."""
        clusters, distances = [], []
        for start in range(0, len(vectors_ND), CLUSTERING_BATCH):
            distances_NK = self._model.transform(np.asarray(vectors_ND[start : start + CLUSTERING_BATCH], np.float32))
            clusters.append(distances_NK.argmin(1))
            distances.append(distances_NK.min(1))
        return np.concatenate(clusters), np.concatenate(distances)


def examine(reference: Usage, held_N: NDArray[np.bool_], windows: Sequence[Usage], config: DriftConfig) -> list[Window]:
    """Test every window, adjust for all of them, and decide."""
    check_permutations(config, len(windows))
    before_K = np.bincount(reference.clusters_N[held_N], minlength=config.clusters)
    numbered = track(enumerate(windows), len(windows), "drift: windows")
    found = [_test(reference, before_K, window, number, config) for number, window in numbered]
    decide(found, config.trigger, config.level)
    return found


def level_of_one(config: DriftConfig, windows: int) -> float:
    """The p-value at which a single drift test is an alarm whatever the others say."""
    return _level(config.trigger, config.level) / (windows * len(config.tests))


def _level(trigger: TriggerConfig, level: float) -> float:
    return level / 2 if trigger.by == "either" else level


def check_permutations(config: DriftConfig, windows: int) -> None:
    """
    Raises:
        UserError: permutations so few that not even the smallest p-value would do.
    """
    needed = int(np.ceil(1 / level_of_one(config, windows))) - 1
    if config.permutations < needed:
        raise UserError(
            f"permutations: {config.permutations} can raise no alarm at level {config.level:g} over {windows} windows "
            f"of {len(config.tests)} tests\nexpected at least {needed}, or larger windows"
        )


def _test(reference: Usage, before_K: Counts, window: Usage, number: int, config: DriftConfig) -> Window:
    rng = np.random.default_rng([config.seed, 1, number])
    after_K = np.bincount(window.clusters_N, minlength=config.clusters)
    residuals_K, moved_p_K = two_sample.moved_clusters(before_K, after_K, config.permutations, rng)
    return Window(
        rows=len(window.clusters_N),
        counts_K=after_K,
        tests={name: _one_test(name, reference, before_K, window, after_K, config, rng) for name in config.tests},
        shift=two_sample.total_variation(before_K, after_K, config.permutations, rng),
        residuals_K=residuals_K,
        moved_p_K=moved_p_K,
        performance=_performance(reference, window, config, rng) if config.performance else None,
    )


def _one_test(
    name: str,
    reference: Usage,
    before_K: Counts,
    window: Usage,
    after_K: Counts,
    config: DriftConfig,
    rng: np.random.Generator,
) -> Result:
    match name:
        case "mmd":
            return two_sample.mmd(reference.vectors_ND, window.vectors_ND, config.block, config.permutations, rng)
        case "classifier":
            return two_sample.classifier(reference.vectors_ND, window.vectors_ND, config.permutations, rng)
        case _:
            return two_sample.jensen_shannon(before_K, after_K, config.permutations, rng)


def _performance(reference: Usage, window: Usage, config: DriftConfig, rng: np.random.Generator) -> Performance:
    before_N, after_N = reference.performance_N, window.performance_N
    assert before_N is not None and after_N is not None
    if reference.pairs_N is None or window.pairs_N is None:
        result = two_sample.fall(before_N, after_N, config.permutations, rng)
        return Performance(float(before_N.mean()), float(after_N.mean()), len(after_N), result)
    places = {pair: place for place, pair in enumerate(reference.pairs_N)}
    both = [(places[pair], place) for place, pair in enumerate(window.pairs_N) if pair in places]
    if len(both) < 2:
        raise UserError(
            f"performance.pair: {len(both)} rows of a window name a row of the reference; expected 2 or more"
        )
    before, after = (
        array[list(rows)] for array, rows in zip((before_N, after_N), zip(*both, strict=True), strict=True)
    )
    result = two_sample.paired_fall(before - after, config.permutations, rng)
    return Performance(float(before.mean()), float(after.mean()), len(both), result)


def decide(windows: Sequence[Window], trigger: TriggerConfig, level: float) -> None:
    """Adjust all p-values and set what each window is."""
    level = _level(trigger, level)
    places = [(window, name) for window in windows for name in window.tests]
    for (window, name), p in zip(places, two_sample.holm([w.tests[name].p for w, name in places]), strict=True):
        window.adjusted[name] = p
    tested = [window for window in windows if window.performance is not None]
    for window, p in zip(tested, two_sample.holm([_p(w) for w in tested]), strict=True):
        window.performance_adjusted = p
    for window in windows:
        # By chance the effect is as often below 0 as above: rows that move within their clusters are a drift too.
        large = not trigger.minimum_shift or window.shift.effect >= trigger.minimum_shift
        window.drifted = min(window.adjusted.values()) <= level and large
        if window.performance is not None and window.performance_adjusted is not None:
            window.fell = window.performance_adjusted <= level and window.performance.fall >= trigger.minimum_fall
        match trigger.by:
            case "drift":
                window.alarm = window.drifted
            case "performance":
                window.alarm = window.fell
            case "both":
                window.alarm = window.drifted and window.fell
            case "either":
                window.alarm = window.drifted or window.fell


def _p(window: Window) -> float:
    assert window.performance is not None
    return window.performance.result.p


def moved(windows: Sequence[Window], level: float) -> NDArray[np.int64]:
    """[windows, K] 1 where a cluster's share grew, -1 where it shrank, 0 where neither is sure.

    That any cluster of any window is named which did not move is as rare as `level`.
    """
    sure = np.array([np.minimum(window.moved_p_K * len(windows), 1) <= level for window in windows])
    return np.where(sure, np.sign([window.residuals_K for window in windows]), 0).astype(np.int64)
