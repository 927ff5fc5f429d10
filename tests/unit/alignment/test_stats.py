import math

import numpy as np
import pytest
from scipy.stats import t as student

from alignment.stats import bootstrap_interval, crossed_interval, mean_interval, paired_interval, resampled_means


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


def test_crossed_interval_by_hand() -> None:
    """Prompt means 0, 1, 2 (variance 1, over 3 prompts 1/3) and seed means 0, 2 (variance 2, over 2 seeds 1): the
    variance is 4/3, its degrees of freedom (4/3)^2 / ((1/3)^2 / 2 + 1^2 / 1) = 32/19."""
    interval = crossed_interval(np.array([[-1.0, 0.0, 1.0], [1.0, 2.0, 3.0]]))
    half = float(student.ppf(0.975, 32 / 19)) * math.sqrt(4 / 3)
    assert (interval.value, interval.low, interval.high) == pytest.approx((1.0, 1.0 - half, 1.0 + half), abs=1e-9)


def test_crossed_interval_of_one_seed_is_that_of_its_prompts() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert crossed_interval(np.array([values])) == mean_interval(values)
    same = crossed_interval(np.full((3, 4), 0.25))
    assert (same.low, same.high) == (0.25, 0.25), "no spread at all"


def test_crossed_interval_covers_the_truth_for_other_prompts_and_seeds() -> None:
    """Effects of prompts, seeds and both, three seeds: the prompts' own interval would cover it far too seldom."""
    rng = np.random.default_rng(0)
    covered = alone = 0
    for _ in range(1000):
        values = rng.normal(size=(1, 40)) + rng.normal(size=(3, 1)) + rng.normal(size=(3, 40))
        interval, naive = crossed_interval(values), mean_interval(values.mean(axis=0).tolist())
        covered += interval.low <= 0 <= interval.high
        alone += naive.low <= 0 <= naive.high
    assert 930 <= covered <= 990
    assert alone < 600


def test_resampled_means_by_hand() -> None:
    """Two prompts, worth 0 and 1: of four equally likely resamples one is 00 (mean 0), two 01 (1/2), one 11 (1)."""
    means = resampled_means(np.array([[0.0, 1.0], [1.0, 0.0]]), seed=0, resamples=20_000)
    values, counts = np.unique(means[:, 0], return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 20_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.015)
    assert (means.sum(axis=1) == 1).all(), "the same prompts are drawn for every column"
    assert (means == resampled_means(np.array([[0.0, 1.0], [1.0, 0.0]]), seed=0, resamples=20_000)).all()
    assert (means[:100] != resampled_means(np.array([[0.0, 1.0], [1.0, 0.0]]), seed=1, resamples=100)).any()


def test_resampled_means_of_prompts_with_several_values() -> None:
    """One value of 1 and three of 0, drawn as prompts: both prompts give 1/4, either twice 1 or 0."""
    means = resampled_means(np.array([[1.0], [0.0]]), np.array([1.0, 3.0]), seed=0, resamples=500)
    assert np.unique(means).tolist() == [0.0, 0.25, 1.0]


def test_bootstrap_interval_by_hand() -> None:
    """Of very many prompts the percentiles are the plain ones; of three, Student's -4.303 times sqrt(3/2) is -5.27,
    below every resample; of twelve, -2.201 times sqrt(12/11) is -2.299, of which the normal tail is .01076."""
    means = np.arange(1001) / 1000
    many = bootstrap_interval(0.5, means, 10**6)
    assert (many.value, many.low, many.high) == pytest.approx((0.5, 0.025, 0.975), abs=1e-4)
    few = bootstrap_interval(0.5, means, 3)
    assert (few.low, few.high) == pytest.approx((0.0, 1.0), abs=1e-4)
    assert bootstrap_interval(0.5, means, 12).low == pytest.approx(0.01076, abs=2e-4)
    assert math.isnan(bootstrap_interval(0.5, means, 1).low)


@pytest.mark.parametrize("prompts", [12, 60])
def test_bootstrap_interval_covers_the_truth_about_19_times_in_20(prompts: int) -> None:
    """Shares of ten samples, their rate drawn for each prompt: 400 such sets."""
    rng = np.random.default_rng(prompts)
    covered = 0
    for number in range(400):
        values = rng.binomial(10, rng.beta(1, 2, prompts)) / 10
        means = resampled_means(values[:, None], seed=number, resamples=1000)[:, 0]
        interval = bootstrap_interval(float(values.mean()), means, prompts)
        covered += interval.low <= 1 / 3 <= interval.high
    assert 0.92 <= covered / 400 <= 0.975
