"""Means and differences over prompts, with 95% intervals: Student's, or the bootstrap's.

The prompt is the unit that is drawn: samples of one prompt are not independent, so intervals come from the spread of
prompt means.

Shapes: P prompts, S seeds, C columns (what is measured of each prompt), R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm as normal
from scipy.stats import rankdata
from scipy.stats import t as student

Array = NDArray[np.float64]

RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95% interval around it."""

    value: float
    low: float
    high: float

    def as_metrics(self, key: str) -> dict[str, float]:
        return {key: self.value, f"{key}.low": self.low, f"{key}.high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one value a prompt, with Student's interval."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(student.ppf(0.975, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return Interval(mean, mean - half, mean + half)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The mean change, prompt by prompt. Both sequences hold one value for each of the same prompts."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} prompts cannot be paired")
    return mean_interval([b - a for a, b in zip(before, after, strict=True)])


def crossed_interval(values_SP: Array) -> Interval:
    """The mean over prompts and seeds, with a 95% interval for other prompts and other seeds.

    Its variance is that of the prompts' means over P and, with two seeds or more, that of the seeds' means over S: in
    the model of crossed random effects never too small, as both count the part that belongs to neither alone (Owen
    2007, arXiv 0712.1111). The degrees of freedom are Satterthwaite's (1946). One seed says nothing of others: then
    it is `mean_interval`.
    """
    seeds, prompts = values_SP.shape
    if seeds < 2 or prompts < 2:
        return mean_interval(values_SP.mean(axis=0).tolist())
    by_prompt = float(values_SP.mean(axis=0).var(ddof=1)) / prompts
    by_seed = float(values_SP.mean(axis=1).var(ddof=1)) / seeds
    mean, variance = float(values_SP.mean()), by_prompt + by_seed
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / (by_prompt**2 / (prompts - 1) + by_seed**2 / (seeds - 1))
    half = float(student.ppf(0.975, freedom)) * variance**0.5
    return Interval(mean, mean - half, mean + half)


def resampled_means(
    sums_PC: Array, sizes_P: Array | None = None, *, seed: int | Sequence[int], resamples: int
) -> Array:
    """Means over prompts drawn with replacement: one row a resample, the same prompts in it for every column.

    So the difference of two columns, resample by resample, is paired. Where prompts hold several values, `sums_PC` are
    their sums and `sizes_P` their numbers, and a mean is one over values (a ratio of sums).
    """
    prompts = len(sums_PC)
    sizes = np.ones(prompts) if sizes_P is None else sizes_P
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        count = min(RESAMPLES_AT_ONCE, resamples - start)
        drawn = rng.integers(prompts, size=(count, prompts)) + prompts * np.arange(count)[:, None]
        times_RP = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts).astype(np.float64)
        means.append(times_RP @ sums_PC / (times_RP @ sizes)[:, None])
    return np.concatenate(means)


def bootstrap_interval(value: float, means_R: Array, prompts: int) -> Interval:
    """The 95% percentile interval of resampled means, with the percentiles moved out for few prompts.

    The bootstrap's spread is too small by sqrt((P-1)/P) and takes no account of its own uncertainty; the expanded
    percentiles (Hesterberg 2015, arXiv 1411.5279, section 4) make up for both. Not known for a single prompt. Where
    all prompts have one value the interval is a point, as the data hold nothing about their spread.
    """
    if prompts < 2:
        return Interval(value, float("nan"), float("nan"))
    tail = normal.cdf(student.ppf(0.025, prompts - 1) * np.sqrt(prompts / (prompts - 1)))
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def separation(correct: Array, wrong: Array) -> float:
    """Probability that a correct sample scores above a wrong one, ties counted as half (area under the ROC curve)."""
    ranks = rankdata(np.concatenate([correct, wrong]))[: len(correct)]
    return float((ranks.sum() - len(correct) * (len(correct) + 1) / 2) / (len(correct) * len(wrong)))
