"""Whole numbers from shares: how many rows each group gives to a draw, and which.

Shapes: G groups.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Amounts = NDArray[np.float64]

FUZZ = 1e-9  # what rounding may have added to an amount that is a whole number


def apportion(weights_G: Sequence[float] | NDArray[Any], total: int, most_G: Sequence[int] | NDArray[Any]) -> Counts:
    """Whole numbers [G] in proportion to the weights, each at most its `most`, that sum to `total` where they can.

    By largest remainders (of equal ones the larger weight, then the first): without limits each number is its share
    rounded up or down. What a group cannot give goes to the others, in proportion. A group of weight 0 gives nothing.
    """
    weights, most = np.asarray(weights_G, np.float64), np.asarray(most_G, np.int64)
    given = np.zeros(len(weights), np.int64)
    is_open = (weights > 0) & (most > 0)
    left = min(total, int(most[is_open].sum()))
    while is_open.any():
        exact = np.where(is_open, weights, 0) / weights[is_open].sum() * left
        over = is_open & (exact >= most)
        if not over.any():
            return given + _rounded(exact, weights, left)
        given[over] = most[over]
        left -= int(most[over].sum())
        is_open &= ~over
    return given


def _rounded(exact_G: Amounts, weights_G: Amounts, total: int) -> Counts:
    down_G = np.floor(exact_G + FUZZ).astype(np.int64)
    remainders_G = np.round(exact_G - down_G, 9)
    first = np.lexsort((np.arange(len(down_G)), -weights_G, -remainders_G))
    down_G[first[: total - int(down_G.sum())]] += 1
    return down_G


def stratified(groups: Sequence[Hashable], count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the rows, drawn without replacement so that every group keeps its share; in the rows' order.

    Args:
        groups: what each row belongs to.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    sizes = [len(rows) for rows in members.values()]
    quotas = apportion(sizes, min(count, len(groups)), sizes)
    drawn = [rng.permutation(rows)[:quota] for rows, quota in zip(members.values(), quotas, strict=True)]
    return sorted(int(index) for part in drawn for index in part)
