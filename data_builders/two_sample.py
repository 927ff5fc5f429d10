"""Do two samples come from one distribution? Tests by permutation, exact at any sample size, and Holm's correction.

Under the null hypothesis every way to deal the pooled rows to the two samples is as likely as the one observed. A
p-value is (1 + b) / (1 + B), b of B random deals giving a statistic at least as large: P(p <= a) <= a for every a, not
only in the limit (Phipson and Smyth 2010, Permutation p-values should never be zero).

Shapes: N rows of the first sample, M of the second, D dimensions, K clusters, B permutations, S rows of a block (both
samples), H hypotheses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data_builders.gaussian_kernel import Array, gaussian, median_distance

Counts = NDArray[np.int64]

AT_ONCE = 1_000  # permutations whose indicators are in memory together
BANDWIDTH_ROWS = 250  # rows of each sample from which the median distance is taken
CLASSIFIER_ROWS = 5_000  # rows of each sample that the classifier sees at most
NO_SPREAD = 1e-24  # the variance of a difference, at least: samples without any spread are as far apart as can be
RIDGE = 0.01  # inverse strength of the classifier's penalty, on standardised features


@dataclass(frozen=True)
class Result:
    """One test: the statistic, what it is on average under the null hypothesis, and how rarely that gives as much."""

    statistic: float
    expected: float
    p: float
    null: Array  # [B] the statistic of each permutation

    @property
    def effect(self) -> float:
        return self.statistic - self.expected

    def threshold(self, level: float) -> float:
        """What the statistic has to exceed for a p-value of at most `level`."""
        return float(np.quantile(self.null, 1 - level, method="higher"))


def _result(statistic: float, null_B: Array) -> Result:
    as_large = (null_B >= statistic) | np.isclose(null_B, statistic, rtol=1e-9, atol=0)  # equal, but summed otherwise
    p = (1 + int(as_large.sum())) / (1 + len(null_B))
    return Result(float(statistic), float(null_B.mean()), p, null_B)


def mmd(x_ND: Array, y_MD: Array, block: int, permutations: int, rng: np.random.Generator) -> Result:
    """Squared maximum mean discrepancy, unbiased, with a Gaussian kernel: Gretton et al. 2012, JMLR 13, equation 3.

    The bandwidth is the median distance in the pooled sample, which no permutation changes. Where both samples have
    more than `block` rows the statistic is the mean over blocks of `block` rows of each (Zaremba et al. 2013, B-tests,
    arXiv 1307.1954) and rows are permuted within their block, so that time and memory grow as rows x block. Rows are
    put into blocks in random order; of the larger sample, those that fill no block are left out.
    """
    if min(len(x_ND), len(y_MD)) <= block:
        parts = [(x_ND[_some(len(x_ND), block, rng)], y_MD[_some(len(y_MD), block, rng)])]
    else:
        blocks = min(len(x_ND), len(y_MD)) // block
        order_x, order_y = rng.permutation(len(x_ND)), rng.permutation(len(y_MD))
        spans = [slice(number * block, (number + 1) * block) for number in range(blocks)]
        parts = [(x_ND[order_x[span]], y_MD[order_y[span]]) for span in spans]
    bandwidth = _bandwidth(x_ND, y_MD, rng)
    sums_B = np.zeros(1 + permutations)
    for x, y in parts:
        pooled = np.concatenate([x, y])
        kernel_SS = gaussian(pooled, pooled, bandwidth)
        np.fill_diagonal(kernel_SS, 0)
        sums_B += _permuted_mmd(kernel_SS, len(x), permutations, rng)
    return _result(sums_B[0] / len(parts), sums_B[1:] / len(parts))


def _some(rows: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.permutation(rows)[:most]


def _bandwidth(x_ND: Array, y_MD: Array, rng: np.random.Generator) -> float:
    """The median distance of 2 BANDWIDTH_ROWS rows of the pooled sample, whatever row is in which of the two."""
    pooled = _some(len(x_ND) + len(y_MD), 2 * BANDWIDTH_ROWS, rng)
    first, second = pooled[pooled < len(x_ND)], pooled[pooled >= len(x_ND)] - len(x_ND)
    return median_distance(np.concatenate([x_ND[np.sort(first)], y_MD[np.sort(second)]]))


def _permuted_mmd(kernel_SS: NDArray[np.float32], first: int, permutations: int, rng: np.random.Generator) -> Array:
    """[1 + B] the statistic of the samples as they are, and of each permutation. The first `first` rows are x."""
    second = len(kernel_SS) - first
    as_it_is = (np.arange(len(kernel_SS)) < first).astype(np.float32)
    rows_S = kernel_SS.sum(1, dtype=np.float64)
    found = []
    for start in range(0, 1 + permutations, AT_ONCE):
        in_x_BS = np.tile(as_it_is, (min(AT_ONCE, 1 + permutations - start), 1))
        in_x_BS[int(start == 0) :] = rng.permuted(in_x_BS[int(start == 0) :], axis=1)
        within_x = np.einsum("bs,bs->b", in_x_BS @ kernel_SS, in_x_BS, dtype=np.float64)
        of_x = in_x_BS @ rows_S
        within_y = rows_S.sum() - 2 * of_x + within_x
        between = of_x - within_x
        found.append(
            within_x / (first * (first - 1)) + within_y / (second * (second - 1)) - 2 * between / (first * second)
        )
    return np.concatenate(found)


def classifier(x_ND: Array, y_MD: Array, permutations: int, rng: np.random.Generator) -> Result:
    """Accuracy of a logistic regression that tells the samples apart (Lopez-Paz and Oquab 2017, arXiv 1610.06545).

    It is trained on half of the rows, as many of each sample, at most CLASSIFIER_ROWS, and judged on the other half,
    whose labels are permuted: given the classifier, they are exchangeable under the null hypothesis. Then the number of
    rows of the first sample among those taken for it is hypergeometric.
    """
    size = min(len(x_ND), len(y_MD), CLASSIFIER_ROWS) // 2 * 2
    # In float16, as embeddings are kept, the scaler's divisions overflow.
    x, y = (rows[_some(len(rows), size, rng)].astype(np.float64) for rows in (x_ND, y_MD))
    half = size // 2
    labels = np.repeat([0, 1], half)
    scaler = StandardScaler().fit(np.concatenate([x[:half], y[:half]]))
    train, test = (scaler.transform(np.concatenate([x[part], y[part]])) for part in (slice(half), slice(half, None)))
    taken_for_y = LogisticRegression(C=RIDGE, max_iter=1_000).fit(train, labels).predict(test)
    called = int(taken_for_y.sum())
    right = int(taken_for_y[half:].sum())
    null_B = rng.hypergeometric(half, half, called, permutations) if called else np.zeros(permutations, np.int64)
    # Of `called` rows taken for y, `right` are: right too are the half - (called - right) others of x.
    return _result(_accuracy(right, called, half), _accuracy(null_B, called, half))


def _accuracy(right: Any, called: int, half: int) -> Any:
    return (2 * right - called + half) / (2 * half)


def jensen_shannon(before_K: Counts, after_K: Counts, permutations: int, rng: np.random.Generator) -> Result:
    """Jensen-Shannon divergence in bits (Lin 1991) between the shares of clusters; 1 where no cluster is in both.

    Its expectation under the null hypothesis is above 0, and the more so the fewer the rows: read the effect.
    """
    pooled_K = before_K + after_K
    after_BK = np.concatenate([after_K[None], permuted_counts(before_K, after_K, permutations, rng)])
    divergence_B = _divergence(pooled_K - after_BK, after_BK)
    return _result(divergence_B[0], divergence_B[1:])


def permuted_counts(before_K: Counts, after_K: Counts, permutations: int, rng: np.random.Generator) -> Counts:
    """[B, K] the second sample's counts where the pooled rows are dealt at random."""
    drawn = int(after_K.sum())
    return rng.multivariate_hypergeometric(before_K + after_K, drawn, size=permutations, method="marginals")


def _divergence(before_BK: Counts, after_BK: Counts) -> Array:
    p_BK = before_BK / before_BK.sum(1, keepdims=True)
    q_BK = after_BK / after_BK.sum(1, keepdims=True)
    middle_BK = (p_BK + q_BK) / 2
    return (rel_entr(p_BK, middle_BK) + rel_entr(q_BK, middle_BK)).sum(1) / (2 * np.log(2))


def total_variation(before_K: Counts, after_K: Counts, permutations: int, rng: np.random.Generator) -> Result:
    """Half the sum of the differences of the clusters' shares: the share of rows that went to other clusters."""
    pooled_K = before_K + after_K
    after_BK = np.concatenate([after_K[None], permuted_counts(before_K, after_K, permutations, rng)])
    before_BK = pooled_K - after_BK
    moved_B = np.abs(before_BK / before_K.sum() - after_BK / after_K.sum()).sum(1) / 2
    return _result(moved_B[0], moved_B[1:])


def moved_clusters(
    before_K: Counts, after_K: Counts, permutations: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Standardised residuals [K], above 0 where a cluster's share grew, and p-values [K] adjusted for all clusters.

    The adjusted p-value is the share of permutations whose largest residual, of whatever cluster, is at least as far
    from 0 (the maxT of Westfall and Young 1993): that any cluster which did not move is named is as rare as stated.
    """
    pooled_K = before_K + after_K
    residuals_K = _residuals(pooled_K, after_K[None])[0]
    largest_B = np.abs(_residuals(pooled_K, permuted_counts(before_K, after_K, permutations, rng))).max(1)
    return residuals_K, (1 + (largest_B[:, None] >= np.abs(residuals_K)).sum(0)) / (1 + permutations)


def _residuals(pooled_K: Counts, after_BK: Counts) -> Array:
    """(observed - expected) / standard deviation of the counts, [B, K], under the hypergeometric null."""
    total, drawn = int(pooled_K.sum()), int(after_BK[0].sum())
    share_K = pooled_K / total
    variance_K = drawn * share_K * (1 - share_K) * (total - drawn) / max(1, total - 1)
    return (after_BK - drawn * share_K) / np.sqrt(np.where(variance_K > 0, variance_K, 1))


def fall(before_N: Array, after_M: Array, permutations: int, rng: np.random.Generator) -> Result:
    """Whether the second sample's mean is lower: Welch's t, permuted. The statistic is t, larger for a larger fall.

    Permuting a studentised difference is exact where the distributions are equal, and holds its level in the limit
    where the means alone are (Janssen 1997; Chung and Romano 2013, Annals of Statistics 41).
    """
    values = np.concatenate([before_N, after_M]).astype(np.float64)
    values -= values.mean()
    dealt = (rng.choice(len(values), len(after_M), replace=False, shuffle=False) for _ in range(permutations))
    null_B = np.array([_welch(values, values[after]) for after in dealt])
    return _result(_welch(values, values[len(before_N) :]), null_B)


def _welch(pooled: Array, after_M: Array) -> float:
    """Welch's t of the pooled values that are not in `after_M` against those that are; the pooled mean is 0."""
    first, second = len(pooled) - len(after_M), len(after_M)
    mean = -after_M.sum() / first
    squares = (pooled**2).sum() - (after_M**2).sum()
    variance = (squares / first - mean**2) / (first - 1) + after_M.var(ddof=1) / second
    return float((mean - after_M.mean()) / np.sqrt(max(variance, NO_SPREAD)))


def paired_fall(falls_N: Array, permutations: int, rng: np.random.Generator) -> Result:
    """Whether the mean of before - after over pairs is above 0: signs are flipped, which is exact (Fisher 1935)."""
    signs_BN = rng.choice([-1.0, 1.0], size=(permutations, len(falls_N)))
    return _result(float(falls_N.mean()), signs_BN @ falls_N / len(falls_N))


def holm(p_H: Sequence[float]) -> list[float]:
    """p-values adjusted for all hypotheses (Holm 1979): to reject those at most a errs once with probability <= a.

    However the tests depend on each other: windows share their reference, and tests their rows.
    """
    adjusted, largest = [0.0] * len(p_H), 0.0
    for place, index in enumerate(sorted(range(len(p_H)), key=lambda index: p_H[index])):
        largest = max(largest, min(1.0, (len(p_H) - place) * p_H[index]))
        adjusted[index] = largest
    return adjusted
