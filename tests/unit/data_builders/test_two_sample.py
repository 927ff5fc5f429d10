"""The statistics by hand or by plain loops, p-values by counting every permutation, and levels that are held."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from data_builders import two_sample
from data_builders.two_sample import holm

MANY = 20_000


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_divergence_and_variation_by_hand() -> None:
    """(1, 0) and (0, 1) share nothing. Shares (3/4, 1/4) and (1/4, 3/4) are half apart; their middle is (1/2, 1/2), and
    log2(3/2) 3/4 + log2(1/2) 1/4 = 0.18872 for each side."""
    apart = np.array([10, 0]), np.array([0, 6])
    assert two_sample.jensen_shannon(*apart, 99, rng()).statistic == pytest.approx(1, abs=1e-12)
    counts = np.array([3, 1]), np.array([1, 3])
    assert two_sample.jensen_shannon(*counts, 99, rng()).statistic == pytest.approx(0.18872187554, abs=1e-10)
    assert two_sample.total_variation(*counts, 99, rng()).statistic == pytest.approx(0.5, abs=1e-12)


def test_p_counts_every_permutation() -> None:
    """Of the 70 ways to deal 4 + 4 rows with 3 + 1 of the first cluster, 16 + 1 give the second sample 1 of the 4 ones
    or none, and 16 + 1 the mirror image, which diverges as much: 34 / 70."""
    found = two_sample.jensen_shannon(np.array([3, 1]), np.array([1, 3]), MANY, rng(1))
    assert found.p == pytest.approx(34 / 70, abs=0.012), "three standard deviations"
    certain = two_sample.jensen_shannon(np.array([50, 0]), np.array([0, 50]), 99, rng(2))
    assert certain.p == 1 / 100, "never 0"


def plain_mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return float(np.mean([np.exp(-((a[i] - b[j]) ** 2).sum() / (2 * bandwidth**2)) for i, j in pairs]))

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_mmd_is_that_of_plain_loops_and_its_p_of_all_deals() -> None:
    x, y = rng(3).normal(size=(4, 3)), rng(4).normal(size=(5, 3)) + 0.7
    pooled = np.concatenate([x, y])
    distances = [float(np.linalg.norm(pooled[i] - pooled[j])) for i, j in combinations(range(9), 2)]
    bandwidth = float(np.median(distances))
    found = two_sample.mmd(x, y, 100, MANY, rng(5))
    assert found.statistic == pytest.approx(plain_mmd(x, y, bandwidth), abs=1e-6), "float32 kernel"
    deals = [
        plain_mmd(pooled[list(first)], pooled[[i for i in range(9) if i not in first]], bandwidth)
        for first in combinations(range(9), 4)
    ]
    share = np.mean([deal >= plain_mmd(x, y, bandwidth) - 1e-6 for deal in deals])
    assert found.p == pytest.approx(share, abs=0.012)


def test_blocks_average_and_permute_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 20 rows: the mean of their statistics; the rows that fill no third block are left out."""
    seen: list[int] = []
    kernel = two_sample.gaussian
    monkeypatch.setattr(two_sample, "gaussian", lambda x, y, width: (seen.append(len(x)), kernel(x, y, width))[1])
    shifted = two_sample.mmd(rng(6).normal(size=(55, 2)), rng(7).normal(size=(49, 2)) + 2, 20, 199, rng(8))
    assert seen == [40, 40] and shifted.p == 1 / 200
    assert shifted.statistic > 10 * shifted.threshold(0.05)


@pytest.mark.parametrize("test", ["mmd", "classifier"])
def test_vectors_in_half_precision_give_what_they_do_in_double(test: str) -> None:
    """One dimension is all but 0, as one of MiniLM's is: its standard deviation is none that float16 can hold."""
    made = rng(0).normal(size=(120, 16))
    half = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)
    half[:, 0] = np.finfo(np.float16).smallest_subnormal * (np.arange(120) % 5 == 0)
    arguments = (20, 99) if test == "mmd" else (99,)
    found = [
        getattr(two_sample, test)(rows[:60], rows[60:], *arguments, rng(1)) for rows in (half, half.astype(np.float64))
    ]
    assert found[0].p == found[1].p and found[0].statistic == pytest.approx(found[1].statistic, abs=1e-12)


def test_the_classifier_tells_apart_what_can_be_told() -> None:
    x, y = rng(9).normal(size=(200, 4)), rng(10).normal(size=(120, 4)) + 3
    found = two_sample.classifier(x, y, 999, rng(11))
    assert found.statistic > 0.95 and found.p == 1 / 1000
    assert found.expected == pytest.approx(0.5, abs=0.02)
    alike = two_sample.classifier(x, rng(12).normal(size=(120, 4)), 999, rng(13))
    assert alike.p > 0.05


def test_right_answers_of_the_classifier_by_hand() -> None:
    """Of 10 + 10 rows 8 are taken for y, 6 of them rightly: right are 6 and 10 - 2 of the others, 14 of 20."""
    assert two_sample._accuracy(6, 8, 10) == 14 / 20


def test_residuals_by_hand_and_only_what_moved_is_named() -> None:
    """40 + 40 rows, 20 of them in the first cluster: 10 expected, variance 40 x 1/4 x 3/4 x 40/79 = 3.797."""
    residuals, p = two_sample.moved_clusters(np.array([5, 35]), np.array([15, 25]), 999, rng(14))
    assert residuals.tolist() == pytest.approx([5 / 3.797468**0.5, -5 / 3.797468**0.5], abs=1e-6)
    assert p[0] == p[1] < 0.05
    residuals, p = two_sample.moved_clusters(np.array([100, 100, 100, 0]), np.array([100, 100, 40, 60]), 999, rng(15))
    assert (p < 0.01).tolist() == [False, False, True, True] and residuals[3] > 0 > residuals[2]


def test_welch_is_scipys_and_a_certain_fall_is_found() -> None:
    before, after = rng(16).normal(size=40), rng(17).normal(size=25) * 3 - 0.5
    found = two_sample.fall(before, after, 999, rng(18))
    assert found.statistic == pytest.approx(ttest_ind(before, after, equal_var=False).statistic, abs=1e-10)
    assert two_sample.fall(np.ones(30), np.zeros(30), 199, rng(19)).p == 1 / 200
    assert two_sample.fall(np.zeros(30), np.ones(30), 199, rng(20)).p == 1, "one-sided"
    assert two_sample.fall(np.ones(30), np.ones(30), 199, rng(21)).p == 1


def test_signs_of_pairs_by_counting() -> None:
    """Falls of 1, 1, 1 and -1: the mean is at least as large in 5 of the 16 ways to sign them."""
    found = two_sample.paired_fall(np.array([1.0, 1, 1, -1]), MANY, rng(22))
    assert found.p == pytest.approx(5 / 16, abs=0.01)


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03 .5 times 4, 3, 2, 1 is .04 .06 .06 .5, never falling."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and holm([]) == []
