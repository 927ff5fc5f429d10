import math
from itertools import combinations

import numpy as np
import pytest

from alignment.stats import best_of_curve, mean_interval, paired_interval, pass_at_k

CASES = [
    ([3.0, 1.0, 2.0, 0.5, 4.0], [True, False, False, True, False]),
    ([1.0, 1.0, 1.0, 1.0], [True, False, False, True]),
    ([2.0, 2.0, 1.0, 3.0, 1.0, 1.0], [True, False, True, False, False, True]),
    ([-1.0, 5.0, 5.0, 0.0, -1.0, 2.0, 2.0], [False, True, False, True, True, False, True]),
    ([0.0], [True]),
]


def best_of_all_subsets(scores: list[float], correct: list[bool], k: int) -> float:
    """Mean over every k-subset of the correctness of its best; a tie is broken evenly."""
    found = []
    for subset in combinations(range(len(scores)), k):
        top = max(scores[i] for i in subset)
        found.append(np.mean([correct[i] for i in subset if scores[i] == top]))
    return float(np.mean(found))


@pytest.mark.parametrize(("scores", "correct"), CASES)
def test_best_of_curve_equals_all_subsets(scores: list[float], correct: list[bool]) -> None:
    expected = [best_of_all_subsets(scores, correct, k) for k in range(1, len(scores) + 1)]
    assert best_of_curve(scores, correct) == pytest.approx(expected, abs=1e-12)


def test_best_of_curve_does_not_depend_on_the_order_of_samples() -> None:
    scores, correct = CASES[3]
    order = np.random.default_rng(0).permutation(len(scores))
    shuffled = best_of_curve([scores[i] for i in order], [correct[i] for i in order])
    assert shuffled == pytest.approx(best_of_curve(scores, correct), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_all_subsets(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            hits = [any(i < correct for i in subset) for subset in combinations(range(n), k)]
            assert pass_at_k(correct, n, k) == pytest.approx(float(np.mean(hits)), abs=1e-12)


@pytest.mark.parametrize(("correct", "n", "k"), [(0, 4, 5), (0, 4, 0), (5, 4, 1), (-1, 4, 1)])
def test_pass_at_k_refuses_what_cannot_be_drawn(correct: int, n: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(correct, n, k)


def test_mean_interval_by_hand() -> None:
    """0, 1, 1, 0: mean 1/2, standard error sqrt(1/3)/2, and Student's 97.5% quantile at 3 degrees is 3.182446."""
    interval = mean_interval([0.0, 1.0, 1.0, 0.0])
    half = 3.182446305 * math.sqrt(1 / 3) / 2
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-8)
    assert interval.as_metrics("p") == {"p": interval.value, "p.low": interval.low, "p.high": interval.high}


def test_interval_of_one_prompt_is_unknown() -> None:
    interval = mean_interval([0.25])
    assert interval.value == 0.25
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_mean_interval_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(1.0, 2.0, size=12).tolist()) for _ in range(1000)]
    assert 930 <= sum(i.low <= 1.0 <= i.high for i in intervals) <= 970


def test_pairing_removes_what_prompts_share() -> None:
    """Prompts differ a lot, every one gains 0.1: the paired interval is a point, the unpaired one spans zero."""
    before = [0.0, 0.2, 0.5, 0.8]
    after = [value + 0.1 for value in before]
    paired = paired_interval(before, after)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_interval([0.0], [0.0, 1.0])
