"""Curves against numbers worked by hand and against all subsets."""

from itertools import combinations

import numpy as np
import pytest

from reward.curves import curve, majority_curve, oracle_curve


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_majority_by_hand() -> None:
    """Votes 7 7 5 5 4, where 7 is right. k=1: 2 of 5. k=5: 7 and 5 tie at two votes each, so 1/2."""
    found = majority_curve(["7", "7", "5", "5", "4"], [True, True, False, False, False], rng())
    assert found[0] == pytest.approx(0.4, abs=1e-12)
    assert found[4] == pytest.approx(0.5, abs=1e-12)


def test_samples_without_an_answer_do_not_vote() -> None:
    """One vote among silent samples decides; a subset without any vote is worth nothing: k=1 is 1/3, k=3 is 1."""
    found = majority_curve([None, "7", None], [False, True, False], rng())
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0], abs=1e-12)
    assert majority_curve([None, None], [False, False], rng()) == pytest.approx([0, 0])


def test_majority_between_is_near_the_mean_over_all_subsets() -> None:
    answers = ["7", "7", "7", "5", "5", "4", None]
    correct = [True, True, True, False, False, False, False]
    found = majority_curve(answers, correct, rng())

    def vote(subset: tuple[int, ...]) -> float:
        votes = [answers[i] for i in subset if answers[i] is not None]
        best = [a for a in set(votes) if votes.count(a) == max(map(votes.count, votes))]
        return float("7" in best) / len(best) if votes else 0.0

    for k in range(1, 8):
        exact = np.mean([vote(subset) for subset in combinations(range(7), k)])
        assert found[k - 1] == pytest.approx(exact, abs=1e-12 if k in (1, 7) else 0.12)


def test_oracle_by_hand() -> None:
    """One right of four: 1/4, 1/2, 3/4, 1."""
    assert oracle_curve([False, True, False, False]) == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-12)


def test_the_curve_is_the_mean_over_prompts_with_its_interval() -> None:
    """Two prompts, 0 and 1: mean 1/2; Student's t of one degree, 12.706, times the standard error 1/2."""
    found = curve([np.array([0.0, 1.0]), np.array([1.0, 1.0])])
    assert found["k"] == [1, 2]
    assert found["value"] == pytest.approx([0.5, 1.0])
    assert found["low"] == pytest.approx([0.5 - 12.7062 * 0.5, 1.0], abs=1e-3)
