"""Whole numbers from shares, and draws that keep the groups' shares: properties, and an example by hand."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alignment.apportion import apportion, stratified

GROUPS = st.lists(st.tuples(st.floats(0, 100, allow_subnormal=False), st.integers(0, 50)), min_size=1, max_size=12)


def test_largest_remainders_by_hand() -> None:
    """10 of 5:3:1:1 over 7 is 3.5, 2.1, 0.7, 0.7: rounded down 3 + 2, the rest to the largest remainders .7 and .7."""
    assert apportion([5, 3, 1, 1], 7, [9, 9, 9, 9]).tolist() == [3, 2, 1, 1]
    assert apportion([5, 3, 1, 1], 7, [2, 9, 9, 9]).tolist() == [2, 3, 1, 1], "5 of 3:1:1 is 3, 1, 1"


@given(GROUPS, st.integers(0, 300))
def test_sums_to_what_is_asked_or_all_there_is(groups: list[tuple[float, int]], total: int) -> None:
    weights, most = zip(*groups, strict=True)
    given_G = apportion(weights, total, most)
    assert given_G.sum() == min(total, sum(m for w, m in groups if w > 0))
    assert all(0 <= g <= m and (w > 0 or g == 0) for g, (w, m) in zip(given_G, groups, strict=True))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(0, 400), st.integers(0, 5))
def test_a_draw_keeps_shares_within_one_row(sizes: list[int], count: int, seed: int) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    np.random.default_rng(seed).shuffle(groups)
    drawn = stratified(groups, count, np.random.default_rng(seed))
    count = min(count, len(groups))
    assert drawn == sorted(set(drawn)) and len(drawn) == count
    found = Counter(groups[row] for row in drawn)
    assert all(abs(found[group] - count * size / len(groups)) < 1 for group, size in enumerate(sizes))
    assert drawn == stratified(groups, count, np.random.default_rng(seed))
