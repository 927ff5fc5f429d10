"""Curves over k of n samples a prompt: what a reward model picks, what the majority says, what an oracle would find."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from alignment import stats
from alignment.stats import Interval

Floats = NDArray[np.float64]

ORDERS = 4  # random orders of a prompt's samples, each rotated n times, for votes among fewer than n


def curve(per_prompt: Sequence[Floats]) -> dict[str, list[float] | list[int]]:
    """The mean over prompts for k = 1..n, with its 95% interval, from one array [n] a prompt."""
    intervals = [stats.mean_interval(column) for column in np.stack(per_prompt, axis=1)]
    return {
        "k": list(range(1, len(intervals) + 1)),
        "value": [interval.value for interval in intervals],
        "low": [interval.low for interval in intervals],
        "high": [interval.high for interval in intervals],
    }


def at(curves: Mapping[str, Mapping[str, Sequence[float]]], name: str, k: int) -> Interval:
    values = curves[name]
    return Interval(values["value"][k - 1], values["low"][k - 1], values["high"][k - 1])


def oracle_curve(correct: Sequence[bool]) -> Floats:
    """pass@k for k = 1..n."""
    n = len(correct)
    return np.array([stats.pass_at_k(sum(correct), n, k) for k in range(1, n + 1)])


def majority_curve(answers: Sequence[str | None], correct: Sequence[bool], rng: np.random.Generator) -> Floats:
    """Expected correctness of the most frequent answer among k of the n samples, for k = 1..n.

    Samples without an answer have no vote; answers with equally many votes share; without a vote it is 0. Exact for
    k = 1 and k = n; between them over random orders, each rotated n times so that every sample comes equally often.
    """
    n = len(answers)
    names = sorted({answer for answer in answers if answer is not None})
    if not names:
        return np.zeros(n)
    votes_NA = np.array([[answer == name for name in names] for answer in answers])
    worth_A = np.asarray(correct, dtype=np.float64) @ votes_NA / votes_NA.sum(0)
    rotations = (np.arange(n)[:, None] + np.arange(n)) % n
    orders_RN = np.concatenate([rng.permutation(n)[rotations] for _ in range(ORDERS)])
    counts_RNA = votes_NA[orders_RN].cumsum(axis=1)
    most_RN1 = counts_RNA.max(axis=2, keepdims=True)
    winners_RNA = (counts_RNA == most_RN1) & (most_RN1 > 0)
    shares_RN = (winners_RNA @ worth_A) / np.maximum(winners_RNA.sum(2), 1)
    return np.asarray(shares_RN.mean(axis=0), dtype=np.float64)
