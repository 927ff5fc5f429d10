"""A stream like its reference raises alarms as rarely as stated; what raises one; why the reference is halved."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from alignment.errors import UserError
from data_builders.config import DriftConfig
from data_builders.drift_tests import Clusters, Performance, Usage, Window, check_permutations, decide, examine, moved
from data_builders.two_sample import Result

SOURCE = {"rows": "rows.jsonl", "vectors": "vectors.npy"}


def config(**changes: Any) -> DriftConfig:
    values: dict[str, Any] = {
        "output_dir": "out",
        "reference": SOURCE,
        "stream": SOURCE,
        "clusters": 12,
        "permutations": 199,
        "block": 100,
    }
    return DriftConfig.model_validate(values | changes)


def topics(rng: np.random.Generator, rows: int, weights: Sequence[float] = (0.5, 0.3, 0.2)) -> np.ndarray:
    """Rows around three corners of a cube in four dimensions."""
    return 3 * np.eye(4)[rng.choice(3, rows, p=weights)] + rng.normal(size=(rows, 4))


def stream(
    seed: int, tests: Sequence[str], shifted: Sequence[float] | None = None, halved: bool = True
) -> list[Window]:
    rng = np.random.default_rng(seed)
    settings = config(seed=seed, tests=tests)
    reference = topics(rng, 120)
    clusters = Clusters(reference, settings.clusters, seed)
    windows = [topics(rng, 60), topics(rng, 60), topics(rng, 60, shifted or (0.5, 0.3, 0.2))]
    return examine(
        Usage(reference, clusters.nearest(reference)[0]),
        clusters.held_N if halved else ~clusters.held_N,
        [Usage(window, clusters.nearest(window)[0]) for window in windows],
        settings,
    )


def alarms(streams: int, *arguments: Any, **options: Any) -> int:
    return sum(any(w.alarm for w in stream(seed, *arguments, **options)) for seed in range(streams))


def test_false_alarms_are_as_rare_as_stated() -> None:
    """120 streams of three windows under three tests: more than 13 alarms have a chance of 0.4% at a rate of 0.05."""
    assert binom.sf(13, 120, 0.05) < 0.005
    assert alarms(120, ["mmd", "classifier", "jensen_shannon"]) <= 13


def test_clusters_fitted_to_the_rows_that_are_compared_would_alarm() -> None:
    """The reason for two halves, and proof that the test above can fail."""
    rng = np.random.default_rng(0)
    found = []
    for halved in (True, False):
        count = 0
        for seed in range(20):
            reference, window = rng.normal(size=(400, 64)), rng.normal(size=(200, 64))
            clusters = Clusters(reference, 40, seed)
            usage = Usage(reference, clusters.nearest(reference)[0])
            settings = config(clusters=40, tests=["jensen_shannon"])
            part = clusters.held_N if halved else ~clusters.held_N
            count += examine(usage, part, [Usage(window, clusters.nearest(window)[0])], settings)[0].alarm
        found.append(count)
    assert binom.sf(5, 20, 0.05) < 0.001 and found[0] <= 5 and found[1] >= 10, found


@pytest.mark.parametrize("test", ["mmd", "classifier", "jensen_shannon"])
def test_each_test_finds_the_window_that_moved(test: str) -> None:
    windows = stream(1, [test], shifted=(0.05, 0.05, 0.9))
    assert [window.alarm for window in windows] == [False, False, True]
    signs = moved(windows, 0.05)
    assert not signs[:2].any() and (signs[2] > 0).any() and (signs[2] < 0).any()


def window(p: float, performance_p: float, shift: float = 0.3, fall: float = 0.1) -> Window:
    def result(p: float, statistic: float = 0.0) -> Result:
        return Result(statistic, 0.0, p, np.zeros(1))

    performance = Performance(0.8, 0.8 - fall, 50, result(performance_p))
    return Window(50, np.ones(2), {"mmd": result(p)}, result(p, shift), np.zeros(2), np.ones(2), performance)


@pytest.mark.parametrize(
    ("by", "drifts", "falls", "expected"),
    [
        ("drift", 0.01, 0.9, True),
        ("drift", 0.9, 0.001, False),
        ("performance", 0.01, 0.9, False),  # harmless drift: no false alarm
        ("performance", 0.9, 0.001, True),  # answers got worse where questions did not change: no missed alarm
        ("both", 0.01, 0.9, False),
        ("both", 0.01, 0.01, True),
        ("either", 0.9, 0.01, True),
        ("either", 0.015, 0.9, False),  # 2 x .015 over two windows is above half of the level
    ],
)
def test_what_raises_an_alarm(by: str, drifts: float, falls: float, expected: bool) -> None:
    """Two windows, the second without anything: p-values of the first are doubled."""
    settings = config(trigger={"by": by}, performance={"column": "correct"})
    windows = [window(drifts, falls), window(0.9, 0.9)]
    decide(windows, settings.trigger, settings.level)
    assert [one.alarm for one in windows] == [expected, False]
    assert windows[0].adjusted["mmd"] == min(1, 2 * drifts)


def test_small_effects_raise_no_alarm() -> None:
    settings = config(trigger={"by": "both", "minimum_shift": 0.2, "minimum_fall": 0.05}, performance={"column": "c"})
    windows = [window(0.001, 0.001), window(0.001, 0.001, shift=0.1), window(0.001, 0.001, fall=0.01)]
    decide(windows, settings.trigger, settings.level)
    assert [one.alarm for one in windows] == [True, False, False]


def test_rows_that_move_within_their_clusters_raise_an_alarm() -> None:
    """No cluster won or lost: by chance the shift over clusters is then as often below what is expected as above."""
    settings = config()
    windows = [window(0.001, 0.9, shift=-0.05)]
    decide(windows, settings.trigger, settings.level)
    assert windows[0].alarm


def test_permutations_that_can_never_alarm_are_refused() -> None:
    """Three tests of 10 windows: the smallest p-value has to be 0.05 / 30, so 599 permutations."""
    check_permutations(config(permutations=599), 10)
    with pytest.raises(UserError, match="598 can raise no alarm .* over 10 windows of 3 tests\nexpected at least 599"):
        check_permutations(config(permutations=598), 10)
    with pytest.raises(UserError, match="clusters: 12 wanted, but half of the reference is 10 rows"):
        Clusters(np.zeros((20, 2)), 12, 0)


def test_pairs_are_compared_with_themselves() -> None:
    """Questions differ far more than the fall of 0.1, which pairs show and means do not."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=60) * 5
    after = before - 0.1 + rng.normal(size=60) * 0.05
    names = [str(number) for number in range(60)]
    vectors, labels = rng.normal(size=(60, 2)), np.zeros(60, np.int64)
    order = rng.permutation(60)
    held = np.ones(60, bool)
    settings = config(performance={"column": "score"}, trigger={"by": "performance"}, tests=["jensen_shannon"])
    unpaired = examine(Usage(vectors, labels, before), held, [Usage(vectors, labels, after)], settings)
    paired = examine(
        Usage(vectors, labels, before, names),
        held,
        [Usage(vectors, labels, after[order], [names[place] for place in order])],
        settings,
    )
    assert not unpaired[0].fell and paired[0].fell
    assert paired[0].performance is not None and paired[0].performance.rows == 60
    assert paired[0].performance.fall == pytest.approx(0.1, abs=0.03)
