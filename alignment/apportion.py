"""Whole numbers from shares: how many rows each group gives to a draw, and which.

Shapes: G groups.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def apportion(weights_G: Sequence[float], total: int, most_G: Sequence[int]) -> Counts:
    """Whole numbers [G] in proportion to the weights, each at most its `most`, that sum to `total` where they can.

    By largest remainders, ties to the first: without limits each number is its share rounded up or down. What a group
    cannot give goes to the others, in proportion. A group of weight 0 gives nothing.
    """
    weights, most = np.asarray(weights_G, np.float64), np.asarray(most_G, np.int64)
    given = np.zeros(len(weights), np.int64)
    is_open = weights > 0
    while is_open.any():
        exact = np.where(is_open, weights, 0) * (total - given[~is_open].sum()) / weights[is_open].sum()
        over = is_open & (exact >= most)
        if not over.any():
            return given + _rounded(exact, int(total - given.sum()))
        given[over] = most[over]
        is_open &= ~over
    return given


def _rounded(exact_G: NDArray[np.float64], total: int) -> Counts:
    down_G = np.floor(exact_G).astype(np.int64)
    largest_first = np.argsort(down_G - exact_G, kind="stable")
    down_G[largest_first[: total - down_G.sum()]] += 1
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
