"""The arithmetic of quotas: by hand, by its laws, and against every way to draw in small cases."""

import re
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.apportion import apportion
from alignment.errors import UserError
from data_builders.selection.quota import Bounds, Counts, deficits, gap_quotas, within_bounds

COUNTS = st.integers(0, 60)
CASES = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 30), min_size=n, max_size=n),  # target
        st.lists(COUNTS, min_size=n, max_size=n),  # training
        st.lists(COUNTS, min_size=n, max_size=n),  # available
        st.integers(0, 200),
    )
)


def arrays(case: tuple[list[int], list[int], list[int], int]) -> tuple[np.ndarray, Counts, Counts, int]:
    target, training, available, budget = case
    return np.array(target) / sum(target), np.array(training), np.array(available), budget


def test_deficits_by_hand() -> None:
    """Of 100 + 50 rows the target wants 75, 45 and 30; 80, 15 and 5 are there."""
    assert deficits(np.array([0.5, 0.3, 0.2]), np.array([80, 15, 5]), 50).tolist() == pytest.approx([0, 30, 25])


def test_quotas_by_hand() -> None:
    """As above, the 50 go 30:25 and thirds: 27.27 and 22.73; where the third has only 10, the second takes its 30,
    and the 10 left over go 5:3:2, of which the third can have none and the second all it still has."""
    target, training = np.array([0.5, 0.3, 0.2]), np.array([80, 15, 5])
    assert gap_quotas(target, training, np.array([99, 99, 99]), 50).gap_C.tolist() == [0, 27, 23]
    short = gap_quotas(target, training, np.array([99, 33, 10]), 50)
    assert (short.gap_C.tolist(), short.beyond_C.tolist()) == ([0, 30, 10], [7, 3, 0])
    inverse = gap_quotas(target, training, np.array([99, 99, 99]), 22, inverse=True)  # 1/16 to 1/6
    assert inverse.gap_C.tolist() == [0, 6, 16]


@given(CASES)
@settings(max_examples=150, deadline=None)
def test_laws_of_quotas(case: tuple[list[int], list[int], list[int], int]) -> None:
    target, training, available, budget = arrays(case)
    wanted = deficits(target, training, budget)
    assert (wanted >= 0).all() and wanted.sum() >= budget - 1e-9
    for inverse in (False, True):
        quotas = gap_quotas(target, training, available, budget, inverse)
        assert (quotas.gap_C >= 0).all() and (quotas.beyond_C >= 0).all()
        assert (quotas.total <= available).all()
        assert quotas.total.sum() == min(budget, available.sum())
        assert (quotas.gap_C <= np.ceil(wanted - 1e-9)).all()
        if quotas.beyond_C.any():  # only once no deficit can be filled further
            assert (quotas.gap_C == np.minimum(available, np.ceil(wanted - 1e-9))).all()


@given(CASES, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_clusters_decides_nothing_but_ties(case: tuple, random: Random) -> None:
    target, training, available, budget = arrays(case)
    order = np.random.default_rng(random.randrange(2**32)).permutation(len(target))
    as_is = gap_quotas(target, training, available, budget).total
    permuted = gap_quotas(target[order], training[order], available[order], budget).total
    assert np.abs(permuted - as_is[order]).max() <= 1


@given(CASES)
@settings(max_examples=100, deadline=None)
def test_more_of_the_target_or_of_the_pool_never_means_fewer_rows(case: tuple) -> None:
    target, training, available, budget = arrays(case)
    quotas = gap_quotas(target, training, available, budget).total
    richer = available.copy()
    richer[0] += 7
    assert gap_quotas(target, training, richer, budget).total[0] >= quotas[0]
    known = training.copy()
    known[0] += 7
    gap = gap_quotas(target, training, available, budget).gap_C[0]
    assert gap_quotas(target, known, available, budget).gap_C[0] <= gap + 1  # 1: rounding
    larger = gap_quotas(target, training, available, budget + 25).total
    assert (larger >= quotas - 1).all()  # largest remainders may move one row (the Alabama paradox)


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_without_training_rows_the_quotas_are_the_targets_shares(case: tuple) -> None:
    target, _, _, budget = arrays(case)
    quotas = gap_quotas(target, np.zeros(len(target), int), np.full(len(target), 500), budget).total
    assert np.abs(quotas - target * budget).max() < 1


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.tuples(
            *[st.lists(st.integers(low, 12), min_size=n, max_size=n) for low in (1, 0, 0)], st.integers(0, 12)
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_no_other_draw_leaves_less_total_variation(case: tuple) -> None:
    """Every way to draw as many rows, up to what rounding to whole rows costs: less than one row a cluster."""
    target, training, available, budget = arrays(case)

    def distance(counts: np.ndarray) -> float:
        after = training + counts
        return float(np.abs(after - target * after.sum()).sum())

    quotas = gap_quotas(target, training, available, budget).total
    ways = product(*(range(min(a, budget) + 1) for a in available.tolist()))
    best = min(distance(np.array(way)) for way in ways if sum(way) == quotas.sum())
    assert distance(quotas) <= best + 2 * len(target)


def test_fill_gives_what_a_cap_cuts_off_to_the_others() -> None:
    assert apportion([5, 3, 2], 10, [2, 99, 99]).tolist() == [2, 5, 3]
    assert apportion([1, 0], 5, [3, 9]).tolist() == [3, 0]
    assert apportion([1, 1, 1], 4, [9, 9, 9]).tolist() == [2, 1, 1]


# Bounds: two clusters; cells are (cluster, Thai or not)

CLUSTER = np.array([0, 0, 1, 1])
THAI = np.array([True, False, True, False])


def bounds(minimum: int = 0, maximum: int | None = None) -> Bounds:
    return Bounds("constraints.languages.th", THAI, minimum, maximum)


def test_a_bound_moves_rows_within_their_clusters() -> None:
    wanted, available = np.array([4, 16, 4, 16]), np.array([30, 30, 30, 30])
    assert within_bounds(wanted, available, CLUSTER, []).tolist() == wanted.tolist()
    assert within_bounds(wanted, available, CLUSTER, [bounds(minimum=8)]).tolist() == wanted.tolist()
    raised = within_bounds(wanted, available, CLUSTER, [bounds(minimum=16)])
    assert raised.tolist() == [8, 12, 8, 12]  # from both clusters alike
    assert within_bounds(wanted, available, CLUSTER, [bounds(maximum=4)]).tolist() == [2, 18, 2, 18]


def test_other_clusters_give_where_one_cannot() -> None:
    wanted, available = np.array([4, 16, 4, 16]), np.array([6, 30, 30, 30])
    result = within_bounds(wanted, available, CLUSTER, [bounds(minimum=26)])
    assert result.tolist() == [6, 14, 20, 0]


def test_maxima_that_leave_too_few_rows_draw_fewer() -> None:
    wanted, available = np.array([4, 16, 4, 16]), np.array([30, 17, 30, 17])
    assert within_bounds(wanted, available, CLUSTER, [bounds(maximum=3)]).sum() == 3 + 17 + 17


def test_impossible_minima_say_what_is_lacking() -> None:
    wanted, available = np.array([4, 16, 4, 16]), np.array([6, 30, 7, 30])
    with pytest.raises(UserError, match=r"constraints.languages.th.minimum: 14 rows, but the pool has 13 that may"):
        within_bounds(wanted, available, CLUSTER, [bounds(minimum=14)])
    others = Bounds("constraints.domains.toys", ~THAI, 35, None)
    with pytest.raises(UserError) as caught:
        within_bounds(wanted, available, CLUSTER, [bounds(minimum=11), others])
    lacking = re.findall(r"rows are (\d+) too many beside the other bounds, of 40 in all", str(caught.value))
    assert sum(map(int, lacking)) == 11 + 35 - 40


@st.composite
def bounded(draw: st.DrawFn) -> tuple[Counts, Counts, Counts, list[Bounds]]:
    """Up to 3 clusters x 2 languages x 2 domains, and bounds that one draw of as many rows is known to hold."""
    cells = np.array(list(product(range(draw(st.integers(1, 3))), range(2), range(2))))
    several = st.lists(st.integers(0, 9), min_size=len(cells), max_size=len(cells))
    possible, more, start = (np.array(draw(several)) for _ in range(3))
    available = possible + more
    wanted = apportion(start + 1e-6, int(possible.sum()), available)
    found = []
    for column, value in product((1, 2), (0, 1)):
        members = cells[:, column] == value
        held = int(possible[members].sum())
        least, most = draw(st.integers(0, held)), draw(st.none() | st.integers(held, held + 5))
        found.append(Bounds(f"{column}.{value}", members, least, most))
    return wanted, available, cells[:, 0], found


@given(bounded())
@settings(max_examples=40, deadline=None)
def test_bounds_that_can_be_held_are_held(case: tuple[Counts, Counts, Counts, list[Bounds]]) -> None:
    wanted, available, clusters, found = case
    result = within_bounds(wanted, available, clusters, found)
    assert (result >= 0).all() and (result <= available).all()
    assert result.sum() == wanted.sum()
    for bound in found:
        drawn = result[bound.members_X].sum()
        assert bound.minimum <= drawn <= (np.inf if bound.maximum is None else bound.maximum)
